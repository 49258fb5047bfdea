"""Parts of a float denoiser that are taken out for good, and what is left trained to make up for them. The result is a smaller model of the
same class: stock ``from_pretrained`` opens it, and any recipe quantizes it. Weights that are removed one by one are a solver
(:mod:`reelquant.solvers.sparse`); blocks that are left out at some steps are a reuse (:mod:`reelquant.reuse`)."""

from reelquant.removal.run import Dropped, drop

__all__ = ["Dropped", "drop"]
