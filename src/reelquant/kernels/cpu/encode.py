"""Runs of floats to codes, and their smallest and largest number: sixteen at a time, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from reelquant.kernels.cpu.addresses import emit_address
from reelquant.kernels.cpu.lanes import BITS, F32, I32, I64, LANES, Lanes, loop, size_of

I1 = ir.IntType(1)


@dataclass(frozen=True)
class Run:
    """What is read.

    Attributes:
        x: address of the first number.
        source: its bits.
        count: numbers.
        multiply, add: addresses of as many factors and summands.
    """

    x: Any
    source: Any
    count: Any
    multiply: Any
    add: Any

    def read(self, lanes: Lanes, index: Any, rewrites: bool) -> Any:
        """Numbers, times factors plus summands if they are rewritten."""
        value = lanes.load(self.x, index, self.source)
        return lanes.times_plus(value, *(lanes.load(one, index, F32) for one in (self.multiply, self.add))) if rewrites else value

    def passed(self, builder: Any, step: Callable[[Lanes], tuple[list[float], Callable[..., list[Any]], Callable[..., None]]]) -> None:
        """Loops over the run, sixteen numbers at a time, then one by one; the code for rewritten ones stands beside that for others.

        Args:
            step: gives what the loop starts with, ``(rewrites, index, *carried) -> carried``, and what follows the loop.
        """
        whole = builder.and_(self.count, ir.Constant(I64, -LANES))
        some = builder.icmp_unsigned("!=", self.multiply, ir.Constant(I64, 0))
        for lanes, begin, end in ((Lanes(builder, LANES), ir.Constant(I64, 0), whole), (Lanes(builder, 1), whole, self.count)):
            with builder.if_else(some) as branches:
                for rewrites, branch in zip((True, False), branches, strict=True):
                    with branch:
                        start, body, after = step(lanes)
                        carried = [lanes.constant(one) for one in start]
                        after(*loop(builder, begin, end, lanes.count, carried, lambda *given, body=body, r=rewrites: body(r, *given)))


def _run(context: Any, builder: Any, kinds: Any, x: Any, first: Any, count: Any, multiply: Any, add: Any) -> Run:
    source = BITS[kinds[0].dtype]
    start = builder.add(emit_address(context, builder, kinds[0], x), builder.mul(first, ir.Constant(I64, size_of(source))))
    factors, summands = (emit_address(context, builder, kind, one) for kind, one in zip(kinds[3:5], (multiply, add), strict=True))
    length = cgutils.unpack_tuple(builder, context.make_array(kinds[3])(context, builder, multiply).shape)[0]
    some = builder.icmp_signed(">", length, ir.Constant(I64, 0))
    return Run(start, source, count, builder.select(some, factors, ir.Constant(I64, 0)), summands)


@intrinsic
def encode(
    typing: Any,
    x: Any,
    first: Any,
    count: Any,
    multiply: Any,
    add: Any,
    inverse: Any,
    zero: Any,
    low: Any,
    high: Any,
    codes: Any,
    place: Any,
) -> Any:
    """``codes[place + j] = clamp(round((x[first + j] * multiply[j] + add[j]) * inverse + zero), low, high)`` for ``count`` numbers.

    Arrays are contiguous and counted through as if they had one axis.

    Args:
        x: float32, or bfloat16 as int16.
        multiply, add: ``count`` float32, or empty.
        inverse, zero, low, high: float32.
        codes: uint8 or int16, written.

    Returns:
        Whether the run may hold NaN or infinities: codes cannot, so the caller has to look.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        run = _run(context, builder, signature.args, *arguments[:5])
        numbers, target = arguments[5:9], BITS[signature.args[9].dtype]
        begin = emit_address(context, builder, signature.args[9], arguments[9])
        begin = builder.add(begin, builder.mul(arguments[10], ir.Constant(I64, size_of(target))))
        strange = cgutils.alloca_once_value(builder, ir.Constant(I1, 0))

        def step(lanes: Lanes) -> Any:
            factor, summand, least, most = map(lanes.spread, numbers)

            def body(rewrites: bool, index: Any, seen: Any) -> list[Any]:
                value = run.read(lanes, index, rewrites)
                rounded = lanes.rounded(lanes.times_plus(value, factor, summand))
                inside = lanes.smaller(lanes.larger(rounded, least), most)
                lanes.store(builder.fptosi(inside, lanes.kind(I32)), begin, index, target)
                return [lanes.times_plus(value, lanes.constant(0.0), seen)]  # NaN where a number is no finite one

            return [0.0], body, lambda seen: builder.store(builder.or_(builder.load(strange), lanes.any_nan(seen)), strange)

        run.passed(builder, step)
        return builder.load(strange)

    floats = [types.float32] * 4
    return types.boolean(x, types.int64, types.int64, multiply, add, *floats, codes, types.int64), code


@intrinsic
def ends(typing: Any, x: Any, first: Any, count: Any, multiply: Any, add: Any, found: Any) -> Any:
    """The smallest and the largest of all ``x[first + j] * multiply[j] + add[j]``; infinities of an empty run.

    Args:
        x, first, count, multiply, add: as of :func:`encode`.
        found: ``[2]`` float32, written.

    Returns:
        Whether the run may hold NaN or infinities; what is found then means nothing.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        run = _run(context, builder, signature.args, *arguments[:5])
        strange = cgutils.alloca_once_value(builder, ir.Constant(I1, 0))
        kept = [cgutils.alloca_once_value(builder, ir.Constant(F32, one)) for one in (np.inf, -np.inf)]

        def step(lanes: Lanes) -> Any:
            def body(rewrites: bool, index: Any, low: Any, high: Any, seen: Any) -> list[Any]:
                value = run.read(lanes, index, rewrites)
                return [lanes.smaller(value, low), lanes.larger(value, high), lanes.times_plus(value, lanes.constant(0.0), seen)]

            def after(low: Any, high: Any, seen: Any) -> None:
                single = Lanes(builder, 1)
                for place, value, both, one in (
                    (kept[0], low, lanes.smaller, single.smaller),
                    (kept[1], high, lanes.larger, single.larger),
                ):
                    builder.store(one(lanes.chosen(value, both), builder.load(place)), place)
                builder.store(builder.or_(builder.load(strange), lanes.any_nan(seen)), strange)

            return [np.inf, -np.inf, 0.0], body, after

        run.passed(builder, step)
        target = emit_address(context, builder, signature.args[5], arguments[5])
        for index, place in enumerate(kept):
            where = builder.inttoptr(builder.add(target, ir.Constant(I64, 4 * index)), F32.as_pointer())
            builder.store(builder.load(place), where)
        return builder.load(strange)

    return types.boolean(x, types.int64, types.int64, multiply, add, found), code
