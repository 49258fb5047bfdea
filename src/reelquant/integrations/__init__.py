"""Plugs into other libraries. Nothing here is imported before the other library is."""
