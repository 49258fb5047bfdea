"""Recipes as data: reading, checking and merging YAML. What works through a recipe is in ``engine``."""
