"""Which layers the kernels of NVIDIA GPUs do not compute, and why, beyond the features that each kernel takes."""

from __future__ import annotations

from reelquant.formats import Int
from reelquant.kernels import cuda
from reelquant.kernels.operands import InputQuant, Operands

GROUPS = (64, 128)  # that a product is made of as they are
DEEPEST = 65535  # codes in a row of the weight whose int32 sums, correction included, cannot overflow
WHOLE = ("tensor", "channel")  # granularities of weights whose scale multiplies the finished sum


def _weight(operands: Operands, bits: tuple[int, ...], kinds: tuple[str, ...]) -> str | None:
    weight = operands.weight.quantizer
    if not isinstance(weight.format, Int) or not weight.format.signed or weight.format.bits not in bits:
        return f"weights are {weight.format.name}, not int{' or int'.join(map(str, bits))}"
    return _shape(operands, kinds)


def _shape(operands: Operands, kinds: tuple[str, ...]) -> str | None:
    weight = operands.weight
    if weight.quantizer.granularity.kind not in kinds:
        return f"weights have a scale per {weight.quantizer.granularity}"
    return None if weight.width <= DEEPEST else f"{weight.width} products per output, more than {DEEPEST}"


def _input(operands: Operands) -> str | None:
    numbers = operands.input
    if numbers is None:
        return "the input stays float"
    if not isinstance(numbers.format, Int):
        return f"inputs are {numbers.format.name}, not integers"
    if numbers.rule is not None and not numbers.format.signed:
        return f"dynamic inputs are {numbers.format.name}, not symmetric"
    return _grain(operands, numbers)


def _grain(operands: Operands, numbers: InputQuant) -> str | None:
    """Why the scales of an input are not those that kernels read or find, or None."""
    kind = numbers.granularity.kind
    if numbers.rule is None:
        return None if kind == "tensor" else f"static inputs have one scale, not one per {kind}"
    found = "token" if operands.window is None else "sample"
    if kind != found or not numbers.rule.range.covers_all:
        return f"dynamic inputs of this layer have a scale per {found}, of its largest magnitude"
    return None


def _float8(operands: Operands) -> str | None:
    weight, numbers = operands.weight.quantizer.format.name, operands.input
    if weight != "e4m3":
        return f"weights are {weight}, not e4m3"
    if numbers is None:
        return "the input stays float"
    if numbers.format.name != "e4m3":
        return f"inputs are {numbers.format.name}, not e4m3"
    return _shape(operands, WHOLE) or _grain(operands, numbers) or cuda.float8()


def _window(operands: Operands) -> str | None:
    """Why a layer is not a convolution that kernels know, or None."""
    if operands.window is None or len(operands.window.stride) not in (2, 3):
        return "not a convolution over two or three axes"
    return None


FEW = tuple(range(2, 9))  # bits of symmetric weights that fit into int8 codes


def refuses_plain(operands: Operands) -> str | None:
    """Why torch's own integer product does not compute a layer, or None; it asks for no Triton."""
    return _weight(operands, FEW, WHOLE) or _input(operands)


def refuses_linear(operands: Operands) -> str | None:
    """Why a layer is not a product of 8-bit codes, or None."""
    return refuses_plain(operands) or cuda.available()


def refuses_nibbles(operands: Operands) -> str | None:
    """Why a layer is not a product of 8-bit codes and 4-bit codes in groups, or None."""
    reason = _weight(operands, (4,), ("group",)) or _input(operands)
    if reason is None and (operands.weight.quantizer.granularity.size not in GROUPS or operands.input is None or operands.input.rule):
        reason = f"groups of {', '.join(map(str, GROUPS))} with static inputs"
    return reason or cuda.available()


def refuses_convolution(operands: Operands) -> str | None:
    """Why a layer is not a convolution of 8-bit codes, or None."""
    return _window(operands) or _weight(operands, FEW, WHOLE) or _input(operands) or cuda.available()


def refuses_folded(operands: Operands) -> str | None:
    """Why a layer is not a product of 8-bit codes once the scales of its groups are folded into them, or None."""
    window = None if operands.window is None else _window(operands)
    return window or _weight(operands, FEW, ("group",)) or _input(operands) or cuda.available()


def refuses_plain_float8(operands: Operands) -> str | None:
    """Why torch's own e4m3 product does not compute a layer, or None; it asks for no Triton."""
    return _float8(operands)


def refuses_float8(operands: Operands) -> str | None:
    """Why a layer is not a product of e4m3 codes, or None."""
    return refuses_plain_float8(operands) or cuda.available()


def refuses_float8_convolution(operands: Operands) -> str | None:
    """Why a layer is not a convolution of e4m3 codes, or None."""
    return _window(operands) or _float8(operands) or cuda.available()


def refuses_float(operands: Operands) -> str | None:
    """Why a layer is not a product of floats and codes, or None."""
    quantizer = operands.weight.quantizer
    if quantizer.format.name == "e4m3":
        return _shape(operands, WHOLE) or cuda.float8() or cuda.available()
    bits = quantizer.format.bits
    reason = _weight(operands, (4, 8), WHOLE if bits == 8 else ("group",))
    if reason is None and bits == 4 and quantizer.granularity.size not in GROUPS:
        reason = f"4-bit groups are {', '.join(map(str, GROUPS))}"
    return reason or cuda.available()


def refuses_nothing(operands: Operands) -> str | None:
    """None: every weight can be made float."""
    return None
