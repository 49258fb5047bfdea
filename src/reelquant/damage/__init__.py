"""What rounding a layer does to the clips of a model, measured in three ways that fill one table. How a budget is divided from such a table
is in :mod:`reelquant.allocate` and does not belong here.

``scene`` is what is measured on, ``rounding`` changes one layer, ``gains`` says how an error of the denoiser at a step grows until the last
one; ``trajectory``, ``gradient`` and ``noise`` are the three ways; ``kept`` lets a run that was stopped go on, ``run`` does all of it,
``picture`` draws.
"""

from reelquant.damage.run import Measured, Wanted, measure

__all__ = ["Measured", "Wanted", "measure"]
