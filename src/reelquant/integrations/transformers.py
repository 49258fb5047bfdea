"""reelquant as a quantization method of transformers (5 and later): text encoders, quantized while they load, saved, and opened again."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from reelquant._errors import ReelQuantError, UnsupportedError
from reelquant._torch_state import stock_torch
from reelquant.checkpoint import METHOD, Shards, Stored, adopt
from reelquant.integrations.config import ReelQuantConfig, data_free
from reelquant.integrations.loading import OnTheFly, check_bias, plan_for, put_empty_layers, put_float_layers, start_loaded
from reelquant.models.manifest import check_files
from reelquant.nn import QuantLayer, get_module, quantized_layers

__all__ = ["METHOD", "ReelQuantConfig", "ReelQuantHfQuantizer"]


class ReelQuantHfQuantizer(HfQuantizer):
    """The counterpart of :class:`reelquant.integrations.diffusers.ReelQuantizer`."""

    quantization_config: ReelQuantConfig  # type: ignore[assignment]

    def __init__(self, quantization_config: ReelQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]
        self.stored: Stored | None = None
        self.on_the_fly: OnTheFly | None = None
        self.failed: ReelQuantError | None = None
        self._covered = False  # by the sums of files
        if self.pre_quantized:
            self.stored = Stored.from_json(quantization_config.to_dict())
        else:
            data_free(quantization_config.recipe)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse offloading to disk, which would cast scales."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError("quantized models cannot be offloaded to disk by device_map; use 'cpu' and devices in it")

    # --- float checkpoints --------------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of a float checkpoint goes to :meth:`convert`."""
        return self.on_the_fly is not None and self.on_the_fly.wants(param_name)

    def get_quantize_ops(self) -> ReelQuantHfQuantizer:
        """The object whose :meth:`convert` gets the tensors."""
        return self

    @stock_torch()
    def convert(
        self, input_dict: Mapping[str, Any], model: Any = None, missing_keys: MutableSet[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Take the tensors of layers that are to be quantized; others are handed back.

        transformers collects what is raised here and goes on with random numbers, so an error waits until it may be raised.
        """
        assert self.on_the_fly is not None
        others: dict[str, Any] = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            if not self.on_the_fly.wants(name):
                others[name] = value
                continue
            try:
                self.on_the_fly.take(name, value)
            except ReelQuantError as error:
                self.failed = self.failed or error
            if missing_keys is not None:
                missing_keys.discard(name)
            _mark_loaded(get_module(model, name.rpartition(".")[0]))
        return others

    # --- quantized checkpoints ----------------------------------------------------------------------------------------------------

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized layers are not cast, but for biases that the float layers had."""
        layer, _, tensor = converter.target_patterns[0].rpartition(".")
        ours = self.stored is not None and layer in self.stored.layers
        return None if ours and tensor != "bias" else super().get_new_dtype(converter, param, dtype)

    # --- both ---------------------------------------------------------------------------------------------------------------------

    @stock_torch()
    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.stored is None:
            self.on_the_fly = OnTheFly(model, plan_for(model, self.quantization_config))
        else:
            files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
            self._covered = check_files(files)
            for name, spec in Shards(files).specs.items():
                if name.endswith(tuple(f"{layer}.bias" for layer in self.stored.layers)):
                    check_bias(name, spec.dtype)
            put_empty_layers(model, self.stored)

    @stock_torch()
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failed is not None:
            raise self.failed
        if self.on_the_fly is not None:
            self.on_the_fly.finish()
            adopt(model, self.on_the_fly.plan.recipe)
            self.adopted(model.config.quantization_config)
        assert self.stored is not None
        for layer in quantized_layers(model).values():
            layer.requires_grad_(False)
        start_loaded(model, self.stored, covered=self._covered)
        return model

    def adopted(self, config: ReelQuantConfig) -> None:
        """From now on the model is described by this: as if a quantized checkpoint had been loaded."""
        self.quantization_config, self.on_the_fly, self.pre_quantized = config, None, True
        self.stored = Stored.from_json(config.to_dict())

    @stock_torch()
    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        put_float_layers(model, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _mark_loaded(layer: nn.Module) -> None:
    """Else transformers would initialize a layer that has been exchanged."""
    if isinstance(layer, QuantLayer):
        layer._is_hf_initialized = True  # type: ignore[assignment]
        for tensor in (*layer.parameters(), *layer.buffers()):
            _mark(tensor)


def _mark(tensor: Tensor) -> None:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
