"""What a good range or a good format means: scores of dequantized values against the float ones, larger is better.

``tdscore`` judges temporal features: ``[timesteps, dim]``, one row per denoising step. Its exact formula was never published; ours is
the symmetric reconstruction described in :func:`tdscore`.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def nmse(reference: Tensor, test: Tensor) -> Tensor:
    """Mean squared error over the variance of the reference; unitless, 0 is lossless. Shapes are equal, any rank."""
    reference = reference.float()
    floor = (EPS * reference.square().mean()).clamp(min=torch.finfo(torch.float32).tiny)  # of a constant reference
    return (test.float() - reference).square().mean() / reference.var(correction=0).clamp(min=floor)


def negative_nmse(reference: Tensor, test: Tensor) -> Tensor:
    """``-nmse``: a criterion for values that are not temporal features."""
    return -nmse(reference, test)


def tdscore(reference: Tensor, test: Tensor) -> Tensor:
    """Temporal discriminability of quantized features ``test`` against ``reference``, both ``[timesteps, dim]``; 1 is lossless.

    Half of the score asks whether a quantized feature still points at its own timestep (cosine to its own float feature minus the
    cosine to the nearest other one), half whether timesteps keep their distance. Both are symmetric ratios, ``min(u, 1/u)``: a coarse
    grid that pushes features apart is as wrong as one that merges them. In ``[-1/2, 1]``; timesteps that collapse bring it to 0 or less.

    Paper: QVD (arXiv 2407.11585) names the score and not its formula: this one is a reconstruction with the properties it describes.
    """
    reference, test = reference.double(), test.double()
    if len(reference) < 2:
        return torch.ones(()) if torch.equal(reference, test) else torch.zeros(())
    identify = _symmetric(_identifiability(reference, test), _identifiability(reference, reference))
    separate = _symmetric(_separation(test), _separation(reference))
    return ((identify + separate) / 2).mean().float()


def temporal_objective(reference: Tensor, test: Tensor) -> Tensor:
    """``tdscore - nmse``: the score alone saturates, so a coarse quantizer could win with a large error."""
    return tdscore(reference, test) - nmse(reference, test)


def retrieval_accuracy(reference: Tensor, test: Tensor) -> Tensor:
    """Share of timesteps whose quantized feature is nearest, by cosine, to its own float feature; both ``[timesteps, dim]``."""
    best = _cosine(test.double(), reference.double()).argmax(1)
    return (best == torch.arange(len(best), device=best.device)).float().mean()


def coverage(codes: Tensor, bits: int) -> Tensor:
    """Distinct codes that a channel uses over those it could use, mean over channels; unitless in (0, 1].

    It could use ``2**bits``, or one a sample if there are fewer samples; ``codes``: ``[samples, channels]``.
    """
    ordered = codes.sort(0).values
    distinct = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return distinct.float().mean() / min(2**bits, len(codes))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=1, eps=EPS) @ torch.nn.functional.normalize(b, dim=1, eps=EPS).T


def _identifiability(reference: Tensor, test: Tensor) -> Tensor:
    similarity = _cosine(test, reference)
    own = similarity.diagonal()
    other = similarity.masked_fill(torch.eye(len(own), dtype=torch.bool, device=own.device), -2).amax(1)
    return own - other


def _separation(features: Tensor) -> Tensor:
    distance = (features[:, None] - features[None]).norm(dim=2)
    return distance.masked_fill(torch.eye(len(features), dtype=torch.bool, device=features.device), torch.inf).amin(1)


def _symmetric(value: Tensor, reference: Tensor) -> Tensor:
    """``min(u, 1/u)`` of the ratio for positive ratios, the ratio clipped to [-1, 0] otherwise; a ratio of two zeros is 1."""
    ratio = torch.where((value - reference).abs() <= EPS, torch.ones_like(value), value / reference.clamp(min=EPS))
    return torch.where(ratio > 0, torch.minimum(ratio, 1 / ratio.clamp(min=EPS)), ratio.clamp(-1, 0))


def latent_psnrs(reference: Tensor, test: Tensor) -> Tensor:
    """``10 log10(peak^2 / mse)`` of every clip, ``[clips]`` in dB, with the range of all reference latents as the peak.

    Broken clips count -100.
    """
    error = (test.float() - reference.float()).square().flatten(1).mean(1)
    peak = reference.float().amax() - reference.float().amin()
    psnr = 10 * torch.log10(peak.square() / error.clamp(min=1e-20))
    return torch.nan_to_num(psnr, nan=-100.0, neginf=-100.0)


def latent_psnr(reference: Tensor, test: Tensor) -> float:
    """Mean over clips of :func:`latent_psnrs`."""
    return float(latent_psnrs(reference, test).mean())


def mean_and_worst(reference: Tensor, test: Tensor) -> float:
    """The mean of two figures in dB: the mean of :func:`latent_psnrs`, and its smallest. A gain must not be bought with one clip."""
    psnrs = latent_psnrs(reference, test)
    return float(psnrs.mean() + psnrs.amin()) / 2
