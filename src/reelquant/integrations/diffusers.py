"""reelquant as a quantization method of diffusers: stock ``from_pretrained`` and ``save_pretrained`` of quantized denoisers.

Loading swaps empty quantized layers into the model while it is on the meta device and hands every tensor of theirs over as it is stored:
diffusers would cast scales to the load dtype. Only biases that the float layers had follow that dtype.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from reelquant._errors import CheckpointError, SiteError, UnsupportedError
from reelquant.checkpoint import METHOD, Stored, verify
from reelquant.clock import Clock
from reelquant.nn import (
    dequantized,
    get_module,
    kernels_of,
    quantized_class,
    quantized_layers,
    set_module,
    start_clock,
    start_runtime,
    stop_clock,
    stop_runtime,
)

logger = logging.getLogger(__name__)


class Method(str, Enum):
    """diffusers wants an enum member with ``.value``."""

    REELQUANT = METHOD


class ReelQuantConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model, as plain data; :class:`~reelquant.checkpoint.Stored` gives it meaning."""

    def __init__(self, quant_method: str = METHOD, **content: Any) -> None:
        self.quant_method = Method(quant_method)  # type: ignore[assignment]
        self.content = content

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"quant_method": METHOD, **copy.deepcopy(self.content)}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReelQuantConfig) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        name = (self.content.get("recipe") or {}).get("name")
        return f"ReelQuantConfig(recipe={name!r}, {len(self.content.get('checksums', ()))} layers)"


class ReelQuantizer(DiffusersQuantizer):
    """Opens and describes quantized models. Models are quantized by :func:`reelquant.quantize`, not while loading."""

    use_keep_in_fp32_modules = True  # float parts are treated as if the model were not quantized

    def __init__(self, quantization_config: ReelQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UnsupportedError(
                "this checkpoint is float: load it without quantization_config and call reelquant.quantize(pipe, recipe); "
                "ReelQuantConfig describes checkpoints that reelquant.save has written"
            )
        self.stored = Stored.from_json(quantization_config.to_dict())
        self._keys: set[str] | None = None
        self._made: set[str] = set()  # layers whose bias a transform made: it keeps the dtype it is stored in

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse offloading to disk, which would cast scales."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError("quantized models cannot be offloaded to disk by device_map; use 'cpu' and devices in it")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the names of all stored tensors, over all shards."""
        self._keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, layout in self.stored.layers.items():
            module = _float_layer(model, name)
            self._made |= {name} if module.bias is None and layout.bias else set()
            set_module(model, name, quantized_class(module).like(module, layout, device="meta"))
        self._check_keys(model)

    def _check_keys(self, model: nn.Module) -> None:
        """diffusers only warns about tensors that are missing or left over; here either means a damaged checkpoint."""
        if self._keys is None:
            return
        expected = set(model.state_dict())
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        left = {key for key in self._keys - expected if not any(re.search(pattern, key) for pattern in ignored)}
        for keys, problem in ((expected - self._keys, "lacks"), (left, "has, but its quantization_config does not describe,")):
            if keys:
                some = ", ".join(f"'{key}'" for key in sorted(keys)[:3])
                raise CheckpointError(
                    f"the checkpoint of {type(model).__name__} {problem} {len(keys)} tensors: {some}{' ...' if len(keys) > 3 else ''}; "
                    "download or save it again"
                )

    def check_if_quantized_param(self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any) -> bool:
        """Every tensor of a quantized layer is ours."""
        return param_name.rpartition(".")[0] in self.stored.layers

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Called when shapes differ, which they never should."""
        raise CheckpointError(
            f"'{param_name}' has shape {tuple(loaded_param.shape)} in the checkpoint, its quantization_config and the model's config "
            f"ask for {tuple(current_param.shape)}; download or save it again"
        )

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, state_dict: Mapping[str, Tensor], *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Put a stored tensor into its layer, uncast; only the bias that the float layer had arrives in the load dtype."""
        layer_name, _, tensor = param_name.rpartition(".")
        layer = get_module(model, layer_name)
        is_parameter = tensor in layer._parameters
        value = param_value if tensor == "bias" and layer_name not in self._made else state_dict[param_name]
        value = value.to(target_device)
        expected = getattr(layer, tensor).dtype
        if tensor != "bias" and value.dtype != expected:
            raise CheckpointError(f"'{param_name}' is stored as {value.dtype}, its quantization_config asks for {expected}")
        setattr(layer, tensor, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        slots = self.stored.slots
        if slots is not None:
            start_clock(model, Clock(slots.timesteps), slots.argument)
        start_runtime(model)
        checked = verify(model, self.stored.checksums)
        _log_proof(model, checked)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything is in the state dict; no metadata, whose order in the file would vary.

        Raises:
            UnsupportedError: if adapters wrap quantized layers.
        """
        for name in self.stored.layers:
            if f"{name}.weight" not in state_dict:
                raise UnsupportedError(f"layer '{name}' is wrapped or gone; unload adapters (unload_lora_weights) before saving")
        return state_dict, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dtype = model.dtype
        for name, layer in quantized_layers(model).items():
            made = layer.bias is None or layer.bias.dtype == torch.float16  # else the layer had it, and its dtype is the layer's
            set_module(model, name, dequantized(layer, dtype if made else layer.bias.dtype))
        stop_clock(model)
        stop_runtime(model)
        _forget(model, ("quantization_config", "_pre_quantization_dtype"))
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients pass through quantized layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _float_layer(model: nn.Module, name: str) -> Any:
    """The layer that is to be replaced."""
    try:
        module = get_module(model, name)
    except SiteError as error:
        raise CheckpointError(f"quantization_config names a layer that does not exist: {error}") from None
    if quantized_class(module) is None:
        raise CheckpointError(f"quantization_config names '{name}', which is a {type(module).__name__} and has no quantized form")
    return module


def _forget(model: nn.Module, keys: tuple[str, ...]) -> None:
    """Remove keys of a model's config, which diffusers only lets grow."""
    config = model._internal_dict
    model._internal_dict = type(config)({key: value for key, value in config.items() if key not in keys})


def _log_proof(model: nn.Module, checked: int) -> None:
    layers = quantized_layers(model)
    tensors = [t for layer in layers.values() for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))]
    size = sum(t.numel() * t.element_size() for t in tensors)
    kernels = kernels_of(model)
    names = ", ".join(f"{name} x{count}" for name, count in sorted(kernels.names.items())) + (
        " (simulated in part)" if kernels.simulated else ""
    )
    logger.info(
        "%s: %d quantized layers, %d bytes, %d checksums verified, kernels: %s", type(model).__name__, len(layers), size, checked, names
    )
