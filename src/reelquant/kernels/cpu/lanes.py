"""Instructions for sixteen numbers at a time, or for one: what loops in the compiler's own language are made of.

numba makes a loop for every operation and vectors of eight of it, and it counts references to every slice: two locked instructions, which
take as long as a row of 64 numbers. The vectors are plain ones, which LLVM knows on every processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

LANES = 16
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BITS = {types.float32: F32, types.int16: I16, types.uint8: ir.IntType(8)}
"""dtype of an array -> its bits; bfloat16 is read as int16."""


@dataclass(frozen=True)
class Lanes:
    """Instructions for so many numbers at once.

    Attributes:
        builder: emits them.
        count: 16, or 1 for what is left of a run.
    """

    builder: Any
    count: int

    def kind(self, one: Any) -> Any:
        """The type of so many."""
        return one if self.count == 1 else ir.VectorType(one, self.count)

    def constant(self, value: float) -> Any:
        """The same number everywhere."""
        return ir.Constant(F32, value) if self.count == 1 else ir.Constant(self.kind(F32), [value] * self.count)

    def integer(self, value: int) -> Any:
        """The same 32-bit integer everywhere."""
        return ir.Constant(I32, value) if self.count == 1 else ir.Constant(self.kind(I32), [value] * self.count)

    def spread(self, value: Any) -> Any:
        """One number everywhere."""
        if self.count == 1:
            return value
        nothing, everywhere = ir.Constant(self.kind(F32), ir.Undefined), ir.Constant(self.kind(I32), [0] * self.count)
        return self.builder.shuffle_vector(self.builder.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, everywhere)

    def place(self, address: Any, index: Any, one: Any) -> Any:
        """Where the numbers from this index on lie."""
        offset = self.builder.mul(index, ir.Constant(I64, size_of(one)))
        return self.builder.inttoptr(self.builder.add(address, offset), self.kind(one).as_pointer())

    def load(self, address: Any, index: Any, one: Any) -> Any:
        """Numbers as float32."""
        value = self.bits(address, index, one)
        if one is F32:
            return value
        return self.builder.bitcast(self.builder.shl(self.builder.zext(value, self.kind(I32)), self.integer(16)), self.kind(F32))

    def bits(self, address: Any, index: Any, one: Any) -> Any:
        """Numbers as they are."""
        return self.builder.load(self.place(address, index, one), align=size_of(one))

    def store(self, integers: Any, address: Any, index: Any, one: Any) -> None:
        """Write 32-bit integers as shorter ones."""
        self.builder.store(self.builder.trunc(integers, self.kind(one)), self.place(address, index, one), align=size_of(one))

    def store_floats(self, value: Any, address: Any, index: Any, one: Any) -> None:
        """Write float32, or bfloat16, rounded to nearest even; NaN is not looked for."""
        builder = self.builder
        if one is F32:
            builder.store(value, self.place(address, index, one), align=4)
            return
        bits = builder.bitcast(value, self.kind(I32))
        odd = builder.and_(builder.lshr(bits, self.integer(16)), self.integer(1))
        self.store(builder.lshr(builder.add(builder.add(bits, self.integer(0x7FFF)), odd), self.integer(16)), address, index, one)

    def times_plus(self, value: Any, factor: Any, summand: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(value, factor, flags=("contract",)), summand, flags=("contract",))

    def larger(self, value: Any, other: Any) -> Any:
        """The larger number of each pair; the other where one is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", value, other), value, other)

    def smaller(self, value: Any, other: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered("<", value, other), value, other)

    def rounded(self, value: Any) -> Any:
        """To the nearest integers, as 32-bit ones."""
        kind, suffix = self.kind(F32), "f32" if self.count == 1 else f"v{self.count}f32"
        rint = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind]), f"llvm.rint.{suffix}")
        return self.builder.call(rint, [value])

    def any_nan(self, value: Any) -> Any:
        lanes = self.builder.fcmp_unordered("uno", value, value)
        if self.count == 1:
            return lanes
        return self.builder.icmp_unsigned("!=", self.builder.bitcast(lanes, ir.IntType(self.count)), ir.Constant(ir.IntType(self.count), 0))

    def chosen(self, value: Any, choose: Callable[[Any, Any], Any]) -> Any:
        """The one number that is chosen from all pairs."""
        width = self.count
        while width > 1:
            width //= 2
            order = ir.Constant(self.kind(I32), [lane ^ width for lane in range(self.count)])
            value = choose(value, self.builder.shuffle_vector(value, value, order))
        return value if self.count == 1 else self.builder.extract_element(value, ir.Constant(I32, 0))


def size_of(one: Any) -> int:
    return 4 if one is F32 else one.width // 8


def loop(builder: Any, begin: Any, end: Any, step: int, start: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """``start = body(index, *start)`` for every ``step``-th index; what it was in the end."""
    entry = builder.block
    going, done = builder.append_basic_block("going"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", begin, end), going, done)
    builder.position_at_end(going)
    index, carried = builder.phi(I64), [builder.phi(one.type) for one in start]
    new = body(index, *carried)
    following, last = builder.add(index, ir.Constant(I64, step)), builder.block
    for phi, first, value in ((index, begin, following), *zip(carried, start, new, strict=True)):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, last)
    builder.cbranch(builder.icmp_signed("<", following, end), going, done)
    builder.position_at_end(done)
    found = [builder.phi(one.type) for one in start]
    for phi, first, value in zip(found, start, new, strict=True):
        phi.add_incoming(first, entry)
        phi.add_incoming(value, last)
    return found
