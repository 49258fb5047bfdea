"""reelquant as a quantization method of diffusers: stock ``from_pretrained`` and ``save_pretrained`` of quantized denoisers.

Loading swaps empty quantized layers into the model while it is on the meta device and hands every tensor of theirs over as it is stored:
diffusers would cast scales to the load dtype. Only biases that the float layers had follow that dtype.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from reelquant._errors import CheckpointError, UnsupportedError
from reelquant._torch_state import stock_torch
from reelquant.checkpoint import METHOD, Stored, adopt
from reelquant.integrations.config import ReelQuantConfig, data_free
from reelquant.integrations.loading import OnTheFly, check_bias, plan_for, put_empty_layers, put_float_layers, start_loaded
from reelquant.models.blank import check_names
from reelquant.models.manifest import check_files
from reelquant.nn import get_module, is_narrow, start_clock, widened

__all__ = ["METHOD", "ReelQuantConfig", "ReelQuantizer"]


class ReelQuantizer(DiffusersQuantizer):
    """Opens quantized models, and quantizes float ones while they load, if the recipe needs no data."""

    use_keep_in_fp32_modules = True  # float parts are treated as if the model were not quantized

    def __init__(self, quantization_config: ReelQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored: Stored | None = None
        self.on_the_fly: OnTheFly | None = None
        self.pre_quantized &= quantization_config.stored or quantization_config.from_file  # from_single_file takes every wish for stored
        if self.pre_quantized:
            self.stored = Stored.from_json(quantization_config.to_dict())
        else:
            data_free(quantization_config.recipe)
        self._keys: set[str] | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._covered = False  # by the sums of files

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse offloading to disk, which would cast scales."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError("quantized models cannot be offloaded to disk by device_map; use 'cpu' and devices in it")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the names of all stored tensors, over all shards, and check the files against the sums of their folder."""
        self._keys = set(loaded_keys)
        self._covered = check_files(checkpoint_files or ())
        return loaded_keys

    @stock_torch()
    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.stored is None:
            self.on_the_fly = OnTheFly(model, plan_for(model, self.quantization_config))
            return
        put_empty_layers(model, self.stored)
        self._check_keys(model)
        self.belongs_to(model)

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
        """Every tensor of a layer that is quantized, or about to be, is ours, and float8 ones of others, which diffusers would not cast."""
        return self._ours(param_name) or is_narrow(param_value)

    def _ours(self, param_name: str) -> bool:
        if self.on_the_fly is not None:
            return self.on_the_fly.wants(param_name)
        return self.stored is not None and param_name.rpartition(".")[0] in self.stored.layers

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Called when shapes differ, which they never should."""
        raise CheckpointError(
            f"'{param_name}' has shape {tuple(loaded_param.shape)} in the checkpoint, its quantization_config and the model's config "
            f"ask for {tuple(current_param.shape)}; download or save it again"
        )

    @stock_torch()
    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a stored tensor into its layer, uncast; only the bias that the float layer had arrives in the load dtype."""
        if not self._ours(param_name):
            set_module_tensor_to_device(model, param_name, target_device, widened(param_value, dtype))
            return
        if param_name.endswith(".bias"):
            param_value = widened(param_value, dtype)
        if self.on_the_fly is not None:
            self.on_the_fly.take(param_name, state_dict[param_name].to(target_device), param_value.to(target_device))
            return
        layer_name, _, tensor = param_name.rpartition(".")
        layer: Any = get_module(model, layer_name)
        is_parameter = tensor in layer._parameters
        value = param_value if tensor == "bias" and not layer.bias_made else state_dict[param_name]
        value = value.to(target_device)
        expected = getattr(layer, tensor).dtype
        if tensor != "bias" and value.dtype != expected:
            raise CheckpointError(f"'{param_name}' is stored as {value.dtype}, its quantization_config asks for {expected}")
        if tensor == "bias":
            check_bias(param_name, state_dict[param_name].dtype)
        setattr(layer, tensor, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    @stock_torch()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.on_the_fly is not None:
            self._describe(model, self.on_the_fly)
        assert self.stored is not None
        slots = self.stored.slots
        if slots is not None:
            start_clock(model, slots.clock(), slots.argument)
        start_loaded(model, self.stored, covered=self._covered)

    def _describe(self, model: Any, done: OnTheFly) -> None:
        """From now on the model, its config and this quantizer are as if a quantized checkpoint had been loaded."""
        done.finish()
        adopt(model, done.plan.recipe)
        self.adopted(model.config["quantization_config"])
        self.belongs_to(model)

    def belongs_to(self, model: nn.Module) -> None:
        """The model that is saved with this."""
        self._model = weakref.ref(model)

    def adopted(self, config: ReelQuantConfig) -> None:
        self.quantization_config, self.on_the_fly, self.pre_quantized = config, None, True
        self.stored = Stored.from_json(config.to_dict())

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything is in the state dict; no metadata, whose order in the file would vary.

        Raises:
            UnsupportedError: if adapters wrap layers, quantized or not, or layers were added that the class would not read.
        """
        wrapped = [key.partition(".base_layer.")[0] for key in state_dict if ".base_layer." in key]
        gone = [name for name in (self.stored.layers if self.stored else ()) if f"{name}.weight" not in state_dict]
        for name in wrapped + gone:
            raise UnsupportedError(f"layer '{name}' is wrapped or gone; unload adapters (unload_lora_weights) before saving")
        if (model := self._model and self._model()) is not None:
            check_names("model", model)
        return state_dict, {}

    @stock_torch()
    def _dequantize(self, model: nn.Module) -> nn.Module:
        put_float_layers(model, model.dtype)
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


def _forget(model: nn.Module, keys: tuple[str, ...]) -> None:
    """Remove keys of a model's config, which diffusers only lets grow."""
    config = model._internal_dict
    model._internal_dict = type(config)({key: value for key, value in config.items() if key not in keys})
