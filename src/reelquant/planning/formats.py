"""A format for every layer under a budget of bits: where allocation plugs in."""

from __future__ import annotations

from reelquant._errors import RecipeError
from reelquant.recipes.recipe import Recipe, load_recipe

BASE = "mixed-w4.5a8"  # a recipe of the library with one allocator
USUAL, LOW = ("int4/group-64", "int6/channel", "int8/channel"), ("int3/group-64", "int4/group-64")
LEAST, MOST = 3.26, 8.0  # bits per weight with scales: all layers in the smallest format, and in the largest
TURN = 4.26  # bits below which formats of three bits are needed


def choose_formats(bits: float) -> Recipe:
    """The recipe that gives every layer of a denoiser one of several formats, ``bits`` per weight on average.

    The choice itself needs weights and data, so it is made while quantizing, from the damage that each format is measured to do.

    Raises:
        RecipeError: for bits that no mixture of the formats has.
    """
    if not LEAST <= bits <= MOST:
        raise RecipeError(f"--bits lies between {LEAST} and {MOST:g} bits per weight with scales, got {bits:g}")
    bits = round(bits, 2)
    formats = USUAL if bits >= TURN else LOW
    changes = {"bits": bits, "formats": list(formats)}
    return load_recipe({"extends": BASE, "name": f"planned-w{bits:g}a8", "steps": {1: changes}})
