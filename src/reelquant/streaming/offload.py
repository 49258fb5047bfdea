"""A denoiser that stays on disk: its parameters are on the meta device, and a block is in memory only while it runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CalibrationError, CheckpointError
from reelquant.checkpoint import Shards, Spec
from reelquant.models.blank import blank_model
from reelquant.nn import QuantLayer, broken, get_module, is_finite

Put = list[tuple[dict[str, Any], str, Tensor]]  # where a tensor was put, and what was there before


def hollow(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a component's folder as ``from_pretrained(dtype=...)`` would load it, its parameters on the meta device.

    Raises:
        CheckpointError: if its config is missing or broken, or it is not a model of the installed diffusers.
    """
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # buffers that a model computes for itself follow it
        model = blank_model(folder)
    finally:
        torch.set_default_dtype(before)
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            single = exact & {*path.split("."), key}
            wanted = torch.float32 if single else dtype if parameter.is_floating_point() else parameter.dtype
            module._parameters[key] = _empty(Spec(wanted, tuple(parameter.shape)))
    return model.eval()


def _empty(spec: Spec) -> nn.Parameter:
    return nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), requires_grad=False)


def _put(put: Put, members: dict[str, Any], values: dict[str, Tensor]) -> None:
    for key, value in values.items():
        put.append((members, key, members[key]))
        members[key] = value


def _within(name: str, parts: Sequence[str]) -> bool:
    """Whether a module is one of these, or a part of one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _take_back(put: Put) -> None:
    for members, key, before in reversed(put):
        members[key] = before
    put.clear()


def keep(name: str, value: Tensor) -> Tensor:
    """A float tensor as it is in its file."""
    return value


class OnDisk:
    """A model whose tensors are loaded from files when they are needed.

    Attributes:
        model: the module, its parameters on the meta device.
        shards: the float checkpoint.
        pieces: files that hold what became of a module, by its name: quantized layers, and norms that took a rewrite over.
        device: where the model runs.
        change: what is done to a float tensor, by its name, after it was read; adapters are merged so.
    """

    def __init__(self, model: nn.Module, shards: Shards, device: str = "cpu") -> None:
        self.model, self.shards, self.device = model, shards, device
        self.pieces: dict[str, Shards] = {}
        self.change: Callable[[str, Tensor], Tensor] = keep
        expected = model.state_dict()
        if missing := sorted(set(expected) - set(shards.specs)):
            raise CheckpointError(
                f"'{shards.files[0].parent}' lacks {len(missing)} tensors of {type(model).__name__}, first '{missing[0]}'; if it was "
                "written for an older diffusers, open the pipeline and save it again"
            )
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        left = (name for name in sorted(set(shards.specs) - set(expected)) if not any(re.search(one, name) for one in ignored))
        if surplus := next(left, None):
            raise CheckpointError(
                f"'{shards.files[0].parent}' holds '{surplus}', for which the {type(model).__name__} of its config.json has no place; "
                "download or save it again"
            )
        for name, value in expected.items():
            if tuple(value.shape) != shards.specs[name].shape:
                raise CheckpointError(
                    f"'{name}' has shape {shards.specs[name].shape} in '{shards.files[0].parent}', its config asks for {tuple(value.shape)}"
                )
            if not value.is_meta:  # a buffer
                value.copy_(shards.load(name))

    def present(self, blocks: Sequence[str]) -> list[str]:
        """Those of the names that the model has; the blocks of an expert are where its twin has them."""
        names = {name for name, _ in self.model.named_modules()}
        return [block for block in blocks if block in names]

    def load(self, name: str) -> Tensor:
        """A tensor of the model as it is now, in the dtype it has there."""
        owner, _, key = name.rpartition(".")
        if owner in self.pieces:
            return self.pieces[owner].load(key)
        like = self.model.get_parameter(name) if name in dict(self._parameters_of(owner)) else self.model.get_buffer(name)
        return self._float(name, like.dtype)

    def _float(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.change(name, self.shards.load(name).to(dtype))

    def _parameters_of(self, owner: str) -> Iterator[tuple[str, Tensor]]:
        for key, value in get_module(self.model, owner).named_parameters(recurse=False):
            yield (f"{owner}.{key}" if owner else key), value

    def layer(self, name: str) -> Any:
        """A copy of a float layer with its tensors in memory; the model keeps none.

        Raises:
            CalibrationError: if a tensor is not finite.
        """
        module = copy.copy(get_module(self.model, name))
        module._parameters = {
            key: None if value is None else nn.Parameter(self._finite(name, key), requires_grad=False)
            for key, value in module._parameters.items()
        }
        return module

    def _finite(self, name: str, key: str) -> Tensor:
        value = self._float(f"{name}.{key}", getattr(get_module(self.model, name), key).dtype)
        if not is_finite(value):
            raise CalibrationError(broken(key, name))
        return value.to(self.device)

    def filled_copy(self, name: str) -> nn.Module:
        """A copy of a part of the model as it is now, its tensors in memory; the model keeps none."""
        put: Put = []
        module = get_module(self.model, name)
        try:
            self._fill(put, module, name, recurse=True)
            return copy.deepcopy(module)
        finally:
            _take_back(put)
            for layer in (part for part in module.modules() if isinstance(part, QuantLayer)):
                layer.residency.forget()

    @contextmanager
    def running(self, blocks: Sequence[str], apart: Sequence[str] = ()) -> Iterator[None]:
        """Inside, the model can be called: a block is loaded before it runs and let go afterwards, all else is in memory throughout.

        Args:
            blocks: module paths.
            apart: modules inside of blocks that are called while their block does not run; they stay in memory, too.
        """
        resident: Put = []
        with ExitStack() as stack:
            stack.callback(_take_back, resident)
            for name, module in self.model.named_modules():
                if not _within(name, blocks) or _within(name, apart):
                    self._fill(resident, module, name, recurse=False)
            for block in blocks:
                for handle in self._hooks(block, apart):
                    stack.callback(handle.remove)
            yield
        for layer in (part for part in self.model.modules() if isinstance(part, QuantLayer)):
            layer.residency.forget()

    def _hooks(self, block: str, apart: Sequence[str]) -> list[Any]:
        put: Put = []
        module = get_module(self.model, block)
        own = {path: part for path, part in module.named_modules() if not _within(f"{block}.{path}", apart)}

        def before(*_: Any) -> None:
            for path, part in own.items():
                self._fill(put, part, f"{block}.{path}" if path else block, recurse=False)

        def after(*_: Any) -> None:
            _take_back(put)
            for layer in (part for part in own.values() if isinstance(part, QuantLayer)):
                layer.residency.forget()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def _fill(self, put: Put, module: nn.Module, name: str, *, recurse: bool) -> None:
        for path, part in module.named_modules() if recurse else [("", module)]:
            owner = ".".join(word for word in (name, path) if word)
            for members in (part._parameters, part._buffers):
                meta = {key: value for key, value in members.items() if value is not None and value.is_meta}
                loaded = {key: self.load(f"{owner}.{key}" if owner else key).to(self.device) for key in meta}
                kind = nn.Parameter if members is part._parameters else None
                _put(put, members, {k: kind(v, requires_grad=False) if kind else v for k, v in loaded.items()})
