"""Recipes of the library that the code names: where a user gives none, and in commands that it proposes."""

FIRST = "qvd-w8a8"
"""The first to try for a denoiser: in 8 bits, close to float."""

SAFE = "w8a16"
"""Of encoders and VAEs: it needs no data."""

MAPPED = "w4a16"
"""Says which layers a map of sensitivity has, and how their weights are ranged."""
