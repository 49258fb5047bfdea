"""What the kernels share on the host: whether they are interpreted, tile configurations, operators for ``torch.compile``, checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from reelquant._errors import UnsupportedError, nearest
from reelquant.kernels.cuda import FLOAT8

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Function = TypeVar("Function", bound=Callable[..., Any])

Tile = tuple[dict[str, int], int, int]  # constants of the kernel, warps, stages of the software pipeline


def tuned(tiles: Sequence[Tile], small: dict[str, int], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorate a kernel: the fastest of ``tiles`` is found once per value of ``key``; the interpreter takes ``small`` unmeasured.

    Every kernel writes all of its output and reads none of it, so that running one several times while tuning is harmless. What was
    found is kept in Triton's cache folder: the next process does not tune again.
    """
    table = [(small, 1, 1)] if INTERPRETED else list(tiles)
    configs = [triton.Config(constants, num_warps=warps, num_stages=stages) for constants, warps, stages in table]
    return triton.autotune(configs=configs, key=list(key), cache_results=True)


def tiles(size: int, tile: int) -> int:
    """How many tiles cover a size. (``triton.cdiv`` on the host takes several times as long.)"""
    return -(-size // tile)


def size_class(rows: int) -> int:
    """Key under which a number of rows is tuned: the next power of two, so that clips of similar length share a choice."""
    return 1 << max(rows - 1, 0).bit_length()


def operation(fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorate a function that launches kernels so that ``torch.compile`` sees one opaque operator, of which ``fake`` gives the shapes.
    ``fake`` takes the function's arguments by name, defaults included, and may ignore those it does not need with ``**_``.

    Outside of compilation the function is called as it is: the dispatcher would cost as much host time as the launch itself.
    """

    def wrap(function: Function) -> Function:
        operator = torch.library.custom_op(f"reelquant::{function.__name__}", function, mutates_args=())
        signature = inspect.signature(function)

        def shapes(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return fake(**bound.arguments)

        operator.register_fake(shapes)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return wrap


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to fill; tests put garbage into it."""
    return torch.empty(shape, dtype=dtype, device=device)


def choose(table: dict[str, int], name: str, what: str) -> int:
    """The number that stands for a name in a kernel.

    Raises:
        UnsupportedError: if no kernel knows the name.
    """
    if name not in table:
        raise UnsupportedError(f"{what} '{name}' is not in any kernel; {nearest(name, table)}")
    return table[name]


def require(condition: bool, message: Callable[[], str]) -> None:
    """Refuse what a kernel cannot compute; the message is only made when it is needed."""
    if not condition:
        raise UnsupportedError(message())


def check_vector(vector: Tensor | None, size: int, what: str) -> None:
    """Vectors are read with stride 1, and past the end nothing is checked: their length must be right."""
    if vector is not None:
        require(
            vector.numel() == size and vector.is_contiguous(),
            lambda: f"{what} needs {size} contiguous values, got shape {tuple(vector.shape)}",
        )


def check_table(table: Tensor, slot: Tensor | None, what: str) -> None:
    """A table of scales ``[slots, 1]`` with several rows needs the 0-d int64 slot that says which row holds."""
    require(
        table.dtype == torch.float32 and table.numel() == table.shape[0] and table.is_contiguous(),
        lambda: f"{what} is a contiguous float32 table [slots, 1], got {table.dtype} of shape {tuple(table.shape)}",
    )
    require(
        slot is not None or table.numel() == 1,
        lambda: f"{what} has {table.numel()} rows and no slot says which one holds; give the clock's slot",
    )
    require(
        slot is None or (slot.numel() == 1 and slot.dtype == torch.int64 and slot.device == table.device),
        lambda: f"the slot of {what} is one int64 on {table.device}, got {slot and slot.dtype} on {slot is not None and slot.device}",
    )


def slots_of(*tables: Tensor | None) -> int:
    """Rows that tables of the same tensor have; 1 without any table."""
    rows = {table.shape[0] for table in tables if table is not None}
    require(len(rows) <= 1, lambda: f"scales and zero points of one tensor have as many rows, got {sorted(rows)}")
    return rows.pop() if rows else 1


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Chips before Ada and Hopper have no fp8 conversions, and Triton has no substitute for e4m3."""
    if dtype == FP8 and not INTERPRETED and torch.cuda.get_device_capability(device) < FLOAT8:
        raise UnsupportedError(f"float8 needs compute capability 8.9 or later, {device} has less; use int8 codes")


def rows_of(x: Tensor) -> Tensor:
    """``[..., width]`` as ``[rows, width]``: a view wherever the leading dimensions lie evenly in memory."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: that is ambiguous for empty tensors
