from __future__ import annotations

import inspect

import pytest

import reelquant
from reelquant import _errors
from reelquant._errors import (
    CalibrationError,
    CheckpointError,
    MeasurementError,
    RanksError,
    RecipeError,
    ReelQuantError,
    SiteError,
    UnsupportedError,
    nearest,
)

TREE = {
    RecipeError: ValueError,
    SiteError: LookupError,
    UnsupportedError: NotImplementedError,
    MeasurementError: ValueError,
    RanksError: RuntimeError,
    CalibrationError: RuntimeError,
    CheckpointError: OSError,
}


@pytest.mark.parametrize(("error", "builtin"), TREE.items(), ids=lambda c: c.__name__)
def test_every_error_is_a_reelquant_error_and_the_natural_builtin(error: type[Exception], builtin: type[Exception]) -> None:
    for caught in (ReelQuantError, builtin):
        with pytest.raises(caught, match="what, where, value, way out"):
            raise error("what, where, value, way out")


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = {c for _, c in inspect.getmembers(_errors, inspect.isclass) if issubclass(c, ReelQuantError)}
    assert classes == {ReelQuantError, *TREE}
    for error, builtin in TREE.items():
        assert f"{error.__name__}({builtin.__name__})" in (_errors.__doc__ or "")


def test_all_errors_are_public() -> None:
    assert {"ReelQuantError", *(error.__name__ for error in TREE)} <= set(reelquant.__all__)


def test_everything_public_exists_and_nothing_else_is_public() -> None:
    assert len(set(reelquant.__all__)) == len(reelquant.__all__)
    for name in reelquant.__all__:
        assert hasattr(reelquant, name), name
    defined = {name for name, value in vars(reelquant).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert defined <= set(reelquant.__all__)


def test_nearest_names_the_one_that_is_near() -> None:
    assert nearest("qvd-w8a9", ["w4a16", "qvd-w8a8"]) == "did you mean 'qvd-w8a8'?"


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("zzz", ["int8", "e4m3"]) == "known: int8, e4m3"
    assert nearest("zzz", []) == "known: none"


def test_nearest_does_not_print_hundreds_of_names() -> None:
    text = nearest("zzz", (f"blocks.{i}" for i in range(500)))
    assert text.startswith("known: blocks.0, blocks.1, ")
    assert text.endswith(", blocks.39 ... (500 in all)")
    long = [f"transformer_blocks.{number}.attention.to_out.0" for number in range(30)]
    assert nearest("zzz", long) == f"known: {', '.join(long[:14])} ... (30 in all)"
    assert nearest("zzz", ["x" * 900]) == f"known: {'x' * 900}"
