"""Attention that follows the number of tokens, for clips of sizes that a model was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from reelquant._errors import RecipeError, UnsupportedError
from reelquant.nn import count_tokens, scale_logits
from reelquant.observe import RecordedCall
from reelquant.sites import DenoiserMap
from reelquant.stages import ModelWork, Stage


@dataclass(frozen=True)
class ScaleLogits(Stage):
    """Scale the scores of self-attention by ``sqrt(log n / log n0)``, where clips of another size have ``n`` tokens instead of ``n0``.

    Paper: arXiv 2306.08645; see :class:`reelquant.nn.ScaledLogits`. Ours counts ``n0`` place by place, so places of several resolutions and
    those over frames have their own.

    Attributes:
        tokens: ``n0`` of all places; 0 counts them in a call of calibration, whose clips then should have the size that the model knows.
    """

    tokens: int = 0
    samples: ClassVar[bool] = False
    exclusive: ClassVar[bool] = True
    default_on: ClassVar[str] = "*"
    takes_on: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.tokens == 1:
            raise RecipeError(f"'tokens' of policy 'scale_logits' is a number of tokens, 2 or more, or 0 to count them, got {self.tokens}")

    @property
    def needs_data(self) -> bool:
        return not self.tokens

    @property
    def in_memory(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.tokens else "scale_logits counts tokens in a call of the whole denoiser; give their number"

    def usual(self, map_: DenoiserMap) -> dict[str, int]:
        """The number of tokens by place, 0 where they are to be counted.

        Raises:
            UnsupportedError: for a denoiser without self-attention.
        """
        sites = [site.name for site in map_.attention if site.role == "self"]
        if not sites:
            raise UnsupportedError(f"policy 'scale_logits' scales self-attention, and nothing of {map_.cls} is known to have some")
        return dict.fromkeys(sites, self.tokens)

    def loaded(self, name: str, model: nn.Module, map_: DenoiserMap) -> None:
        scale_logits(model, self.usual(map_))

    def before_choosing(self, work: ModelWork) -> None:
        tokens = self.usual(work.map)
        if not self.tokens:
            call = RecordedCall(*work.example)
            tokens = count_tokens(work.denoiser, tokens, lambda: work.output(call))
        scale_logits(work.denoiser, tokens)
        work.undo(lambda: scale_logits(work.denoiser, None))
