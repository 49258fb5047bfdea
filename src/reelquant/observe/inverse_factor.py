"""The factor of a damped inverse covariance that column-wise solvers work with."""

from __future__ import annotations

import torch
from torch import Tensor

from reelquant._errors import CalibrationError


def inverse_factor(covariance: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper Cholesky factor ``U``, ``[in, in]`` float32, of a damped inverse covariance: ``U^T U = (C + damping * diag(C))^-1``.

    Rows and columns of ``C`` are taken in ``order`` first.

    Damping is relative to each channel's own variance, so the factor of ``C / (s s^T)`` is ``U * s``: one factorization serves every
    rescaling of the channels. Channels that never move count as average ones. Damping grows tenfold until the factorization succeeds.

    Raises:
        CalibrationError: if the covariance is not finite (inputs beyond 1e19 overflow their squares).
    """
    matrix = (covariance if order is None else covariance[order][:, order]).double()
    if not bool(matrix.isfinite().all()):
        raise CalibrationError("the second moment of a layer's input overflowed; inputs this large cannot be calibrated")
    diagonal = matrix.diagonal()
    diagonal = torch.where(diagonal > 1e-12 * diagonal.amax(), diagonal, diagonal.mean().clamp(min=1e-12))
    matrix = matrix - torch.diag(matrix.diagonal() - diagonal)
    factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(diagonal * damping))
    while bool(failed):  # few samples leave eigenvalues that rounding turns negative
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(diagonal * damping))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
