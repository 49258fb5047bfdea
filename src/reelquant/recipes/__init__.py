"""Recipes as data: reading, checking and merging YAML, and the library of recipes. What works through a recipe is in ``engine``, and the
stages that it names are in the folders of their axes; neither belongs here."""
