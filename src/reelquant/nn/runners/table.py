"""Temporal layers answer from a table of outputs at the timesteps that the table knows."""

from __future__ import annotations

from torch import Tensor

from reelquant._errors import UnsupportedError
from reelquant.clock import Moment
from reelquant.kernels import of_slot
from reelquant.nn.layer_view import LayerView
from reelquant.nn.runners.link import CallKind, Link, activated


class OutputTable(Link):
    """The stored output of the step, for every row of the input; computed at other timesteps, which the clock reports once. A layer
    without a weight refuses them."""

    @staticmethod
    def wanted(layer: LayerView, kind: CallKind) -> bool:
        return bool(layer.layout.table and (layer.clock or layer.layout.folded))

    def __call__(self, x: Tensor, moment: Moment, activation: str) -> Tensor:
        layer = self.layer
        if moment.exact:
            return activated(stored_output(layer, x, moment.slot), activation)
        if layer.layout.folded:
            raise UnsupportedError(folded_refusal(layer))
        layer.clock[0].fall_back()
        return self.inner(x, moment, activation)


def folded_refusal(layer: LayerView) -> str:
    """What a layer without a weight says of a call that its table does not answer."""
    return (
        f"a temporal layer of {layer.layout.table} stored outputs has no weight (temporal: fold), and this call has another timestep, more "
        "than one, an adapter on the layer, or tables turned off; sample with the steps and the scheduler of the calibration, or quantize "
        "with temporal: table"
    )


def stored_output(layer: LayerView, x: Tensor, slot: int | Tensor) -> Tensor:
    """``[..., out]`` in memory of its own, because models add to outputs in place; zeros if no later layer reads the output."""
    shape = (*x.shape[:-1], layer.weight_shape[0])
    if layer.layout.unused:
        return x.new_zeros(shape)
    return of_slot(layer.output_table, slot).to(x.dtype).expand(shape).clone()
