"""The chain of blocks of a denoiser, and the setting of its config that says how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reelquant._errors import UnsupportedError
from reelquant.discover import discover
from reelquant.nn import get_module, quantized_layers
from reelquant.reuse.blocks import chain_of


@dataclass(frozen=True)
class Chain:
    """Blocks of one class that run one after the other.

    Attributes:
        model: the denoiser.
        home: module path of their list.
        setting: of the config, the number of blocks.
    """

    model: nn.Module
    home: str
    setting: str

    @classmethod
    def of(cls, model: nn.Module) -> Chain:
        """The chain of a denoiser.

        Raises:
            UnsupportedError: if it is quantized, has no such chain, or its config does not say how long it is.
        """
        name = type(model).__name__
        if quantized_layers(model):
            raise UnsupportedError(f"{name} is quantized; drop blocks of the float model, and quantize what is left")
        blocks = chain_of(model, discover(model).blocks)
        if blocks is None:
            raise UnsupportedError(
                f"{name} has no chain of blocks of one class that holds more than half of it, as transformers have; a UNet's blocks "
                "hand skips over, and cannot be dropped"
            )
        home, config = blocks[0].rpartition(".")[0], getattr(model, "config", {})
        count = len(_list(model, home))
        counts = [key for key, value in dict(config).items() if type(value) is int and value == count]
        found = [key for key in counts if _builds(model, home, {key: count - 1})]
        if len(found) != 1:
            raise UnsupportedError(
                f"no setting of the config of {name} makes '{home}' one block shorter than {count}, so stock from_pretrained could not "
                "open what is left"
            )
        return cls(model, home, found[0])

    @property
    def blocks(self) -> nn.ModuleList:
        """The list."""
        return _list(self.model, self.home)

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep the blocks with these numbers, in this order, and say so in the config."""
        self.put([self.blocks[number] for number in numbers])

    def put(self, blocks: Sequence[nn.Module]) -> None:
        """Let the chain be these blocks."""
        parent, _, last = self.home.rpartition(".")
        setattr(get_module(self.model, parent) if parent else self.model, last, nn.ModuleList(blocks))
        model: Any = self.model
        model.register_to_config(**{self.setting: len(blocks)})


def _list(model: nn.Module, home: str) -> nn.ModuleList:
    blocks = get_module(model, home)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _builds(model: nn.Module, home: str, changes: dict[str, int]) -> bool:
    """Whether the class builds a model with these settings whose tensors are those of this one without the last block."""
    kind: Any = type(model)
    try:
        with torch.device("meta"):
            made = kind.from_config(dict(model.config) | changes)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except Exception:  # whatever a class says of a config that makes no sense to it
        return False
    last = f"{home}.{len(_list(model, home)) - 1}."
    left = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(last)}
    return left == {name: value.shape for name, value in made.state_dict().items()}
