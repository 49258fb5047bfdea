"""Adapters merged into float weights before they are quantized, one tensor at a time.

diffusers reads the files (its own names, kohya's, those of ComfyUI and of trainers) and peft merges them, both on a copy of the pipeline
whose weights have shapes and no memory. So every adapter that loads into the float pipeline can be merged, and merging a layer needs the
float weight of that layer only.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelquant._errors import CheckpointError, RecipeError, UnsupportedError, nearest
from reelquant._remarks import remark
from reelquant.sites import by_component

EXPERT = "transformer_2"  # Wan 2.2: the second denoiser, for which diffusers wants to be told that a file is meant
Adapters = Mapping[str, float] | Mapping[Path, float] | Sequence[str | Path] | str | Path
"""File -> scale, or texts as the command line takes them: ``FILE``, ``FILE:SCALE``, ``transformer_2=FILE:SCALE``."""


def parse_adapters(adapters: Adapters) -> dict[str, float]:
    """File (with the component before it, if one was named) -> scale.

    Raises:
        RecipeError: if a scale is not a finite number, or a file is given twice.

    Example:
        >>> parse_adapters(["style.safetensors:0.8", "transformer_2=fast.safetensors"])
        {'style.safetensors': 0.8, 'transformer_2=fast.safetensors': 1.0}
    """
    if isinstance(adapters, Mapping):
        pairs = [(str(file), _number(str(file), scale)) for file, scale in adapters.items()]
    else:
        pairs = [_parse(str(text)) for text in ([adapters] if isinstance(adapters, str | Path) else adapters)]
    for file, scale in pairs:
        if not torch.isfinite(torch.tensor(scale)):
            raise RecipeError(f"the scale of adapter '{file}' is {scale}; give a finite number, 1 for its full strength")
    if len(dict(pairs)) < len(pairs):
        raise RecipeError(f"an adapter is given twice in {[file for file, _ in pairs]}; give it once, with the sum of the scales")
    return dict(pairs)


def _parse(text: str) -> tuple[str, float]:
    file, colon, scale = text.rpartition(":")
    if not colon or scale.endswith(".safetensors"):  # no scale, or the colon of a drive
        return text, 1.0
    return file, _number(file, scale)


def _number(file: str, scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError):
        raise RecipeError(
            f"the scale of adapter '{file}' is {scale!r}, which is not a number; write FILE or FILE:SCALE, style.safetensors:0.8"
        ) from None


def short_names(adapters: Mapping[str, float]) -> dict[str, float]:
    """Adapters as reports name them: without folders, or with the last one where files have the same name."""
    parts = [by_component(source) for source in adapters]
    for depth in (1, 2):
        names = [f"{name}=" * bool(name) + "/".join(Path(file).parts[-depth:]) for name, file in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, adapters.values(), strict=True))
    return dict(adapters)


class LoraFiles:
    """Adapter files, ready to be merged.

    Args:
        pipe: the float pipeline they belong to, or one whose weights are on the meta device. It is not changed.
        adapters: see :data:`Adapters`.

    Attributes:
        scales: file -> scale.

    Raises:
        CheckpointError: if a file is missing, broken, no safetensors file, or fits no layer of the pipeline.
        UnsupportedError: if diffusers has no loader of adapters for this pipeline.
        RecipeError: if a scale is not a number, or the pipeline lacks a component that is named.

    Example:
        >>> lora = LoraFiles(pipe, {"style.safetensors": 0.8})
        >>> weight = lora.merged("transformer", "blocks.0.attn1.to_q.weight", weight)
    """

    def __init__(self, pipe: Any, adapters: Adapters) -> None:
        self.scales = parse_adapters(adapters)
        if not hasattr(pipe, "load_lora_weights"):
            raise UnsupportedError(
                f"diffusers has no loader of adapters for {type(pipe).__name__}; merge them with the tool that made them"
            )
        host, self._parts = _hollow_pipeline(pipe)
        for number, source in enumerate(self.scales):
            _load(host, source, f"adapter_{number}", self._parts)
        names = [f"adapter_{number}" for number in range(len(self.scales))]
        self._layers = {part: _wrapped(module, names, list(self.scales.values())) for part, module in self._parts.items()}
        self._changed = {part: _changed(layers) for part, layers in self._layers.items()}

    @property
    def components(self) -> list[str]:
        """Those that merging changes."""
        return [part for part, names in self._changed.items() if names]

    def tensors(self, component: str) -> set[str]:
        """Names of the tensors of a component that :meth:`merged` changes."""
        return self._changed.get(component, set())

    def merged(self, component: str, name: str, value: Tensor) -> Tensor:
        """A tensor of a component with all adapters added to it, in float32 and back in its dtype.

        Args:
            component: ``transformer``, ``unet``, ``text_encoder`` ...
            name: as in the component's state dict, ``blocks.0.attn1.to_q.weight``.
            value: the float tensor; it is not changed, and given back as it is if no adapter is meant for it.

        Raises:
            CheckpointError: if the sum is not finite, or the layer has no place for what an adapter adds.
        """
        if name not in self.tensors(component):
            return value
        layer, _, kind = name.rpartition(".")
        wrapper = self._layers[component][layer]
        base = wrapper.get_base_layer()
        hollow = {key: parameter.data for key, parameter in base.named_parameters(recurse=False)}
        try:
            for key, parameter in base.named_parameters(recurse=False):
                parameter.data = _on_cpu(value) if key == kind else torch.zeros(parameter.shape)
            wrapper.merge(safe_merge=True)
            return getattr(base, kind).data.to(value.device, value.dtype)
        except RuntimeError as error:  # a bias for a layer without one
            raise CheckpointError(f"adapters {list(self.scales)} cannot be merged into '{component}.{layer}': {error}") from error
        except ValueError:  # peft's check for NaN
            raise CheckpointError(
                f"'{name}' is not finite once the adapters {list(self.scales)} are merged; one of them is broken"
            ) from None
        finally:
            wrapper.merged_adapters.clear()
            for key, parameter in base.named_parameters(recurse=False):
                parameter.data = hollow[key]


def _on_cpu(value: Tensor) -> Tensor:
    """A float32 copy beside the factors of the adapters."""
    return value.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def merging(pipe: Any, adapters: Adapters) -> Iterator[None]:
    """Adapters are merged into a float pipeline in memory; if the block fails, the pipeline is as it was.

    Raises:
        ReelQuantError: as :class:`LoraFiles`.
    """
    files = LoraFiles(pipe, adapters)
    originals: dict[tuple[str, str], Tensor] = {}
    try:
        for component in files.components:
            parameters = dict(pipe.components[component].named_parameters())
            for name in files.tensors(component):
                originals[component, name] = parameters[name].data
                parameters[name].data = files.merged(component, name, parameters[name].data)
        yield
    except BaseException:
        for (component, name), value in originals.items():
            pipe.components[component].get_parameter(name).data = value
        raise


def refuse_loaded(pipe: Any) -> None:
    """Adapters beside the layers would be taken for layers.

    Raises:
        UnsupportedError: naming one that is loaded.
    """
    for name, part in pipe.components.items():
        if loaded := getattr(part, "peft_config", None):
            raise UnsupportedError(
                f"adapter '{next(iter(loaded))}' is loaded into '{name}'; unload it (pipe.unload_lora_weights()) and give its file with "
                "lora={file: scale} (--lora), or merge it yourself first: pipe.fuse_lora(), then pipe.unload_lora_weights()"
            )


def _hollow_pipeline(pipe: Any) -> tuple[Any, dict[str, nn.Module]]:
    """A copy of a pipeline whose adaptable components have weights without memory, and those components."""
    parts = {name: pipe.components.get(name) for name in pipe._lora_loadable_modules}
    host, hollow = copy.copy(pipe), {name: _hollow(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    vars(host).update(hollow)
    return host, hollow


def _hollow(module: nn.Module) -> nn.Module:
    """A copy whose parameters are float32 and take no memory, on the CPU, where adapters are loaded next to them."""
    tensors = [(parameter, True) for parameter in module.parameters()] + [(buffer, False) for buffer in module.buffers()]
    memo: dict[int, Any] = {}
    for tensor, is_parameter in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.zeros((), dtype=dtype).expand(tensor.shape)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)


def adapter_file(source: str) -> tuple[str, Path]:
    """The component that an adapter was given for, or nothing, and its file.

    Raises:
        CheckpointError: if the file does not exist, or is not a safetensors file.
    """
    component, file = by_component(source)
    path = Path(file).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        raise CheckpointError(f"no adapter at '{file}'; give a safetensors file (pickled ones can run code and are refused)")
    return component, path


def _load(host: Any, source: str, adapter: str, parts: Mapping[str, nn.Module]) -> None:
    component, path = adapter_file(source)
    if component and component not in parts:
        raise RecipeError(f"adapter '{source}' is for '{component}', which this pipeline lacks; {nearest(component, parts)}")
    expert = {"load_into_transformer_2": True} if component == EXPERT else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are what is wanted
            host.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter, use_safetensors=True, **expert)
    except Exception as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise CheckpointError(f"cannot read adapter '{path}' for {type(host).__name__}: {type(error).__name__}: {reason}") from error
    used = sum(adapter in _adapters(wrapper) for part in parts.values() for wrapper in _tuners(part).values())
    if not used:
        raise CheckpointError(f"adapter '{path}' fits no layer of {type(host).__name__} ({', '.join(parts)}); it is for another model")
    stored = _pairs(host, path)
    if used < stored:
        remark(
            f"adapter '{path}': {used} of {stored} pairs are used, the others fit no layer of {type(host).__name__} ({', '.join(parts)})"
        )


def _pairs(host: Any, path: Path) -> int:
    """For how many layers a file holds a pair of factors, by the names that diffusers translates to; 0 if it holds no such pairs."""
    found = host.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True)
    tensors = found[0] if isinstance(found, tuple) else found
    return len({match[1] for name in tensors if (match := _FACTOR.fullmatch(name))})


_FACTOR = re.compile(r"(.+?)\.lora(?:_A|_B|_down|_up|\.down|\.up|_linear_layer\.down|_linear_layer\.up)\.weight")


def _tuners(module: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def _adapters(wrapper: Any) -> set[str]:
    return {name for kind in wrapper.adapter_layer_names for name in getattr(wrapper, kind, ())}


def _wrapped(module: nn.Module, names: list[str], scales: list[float]) -> dict[str, Any]:
    """Layers with adapters, each at its scale."""
    found = _tuners(module)
    for wrapper in found.values():
        wrapper.set_adapter(names)
        for name, scale in zip(names, scales, strict=True):
            wrapper.set_scale(name, scale)
    return found


def _changed(layers: Mapping[str, Any]) -> set[str]:
    """Tensors that merging changes: weights, and biases where an adapter has one."""
    biased = {layer for layer, wrapper in layers.items() if any(getattr(wrapper, "lora_bias", {}).values())}
    return {f"{layer}.weight" for layer in layers} | {f"{layer}.bias" for layer in biased}
