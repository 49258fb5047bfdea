"""reelquant against values that an independent numpy script computed (``make_golden.py``), and the script against what is stored."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reelquant.formats import Granularity, MinMax, QuantSpec, criteria, fit, pack, parse_format, parse_granularity, unpack
from reelquant.formats.number import NumberFormat
from reelquant.formats.skewed import Log2, LogUniform, Power
from tests.golden import make_golden

STORED = Path(__file__).with_name("golden.json")
GOLDEN: dict[str, Any] = json.loads(STORED.read_text())
INTEGERS = [name for name in GOLDEN["integers"] if name != "weight"]
KINDS = {"log2": Log2, "log_uniform": LogUniform, "power": Power}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every number of a nested structure by its path."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in leaves(item, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for index, item in enumerate(value) for k, v in leaves(item, f"{path}/{index}").items()}
    return {path: value}


def test_the_script_computes_what_is_stored() -> None:
    again, stored = leaves(make_golden.make()), leaves(GOLDEN)
    assert again.keys() == stored.keys()
    for path, value in stored.items():
        # sines and powers differ in the last bit between maths libraries; whatever is an integer or a float32 does not
        assert again[path] == pytest.approx(value, rel=1e-12, abs=1e-15), path


def test_the_script_knows_nothing_of_torch_or_reelquant() -> None:
    tree = ast.parse(Path(make_golden.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "json", "math", "pathlib", "typing", "numpy"}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    expected, weight = GOLDEN["integers"][name], torch.tensor(GOLDEN["integers"]["weight"])
    fmt, granularity = name.split()
    quantizer = fit(QuantSpec(parse_format(fmt), parse_granularity(granularity), MinMax()), weight)
    assert quantizer.scale.tolist() == expected["scale"]
    if "zero_point" in expected:
        assert quantizer.zero_point is not None
        assert quantizer.zero_point.tolist() == expected["zero_point"]
    offset = int(quantizer.format.low)
    assert (quantizer.codes(weight).int() + offset).flatten().tolist() == expected["integers"]
    assert quantizer(weight).flatten().tolist() == expected["values"]


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1"])
def test_small_floats(name: str) -> None:
    points, fmt = torch.tensor(GOLDEN["floats"]["points"]), parse_format(name)
    assert fmt.round(points).tolist() == GOLDEN["floats"][name]
    assert fmt.decode(fmt.encode(points)).tolist() == GOLDEN["floats"][name]


@pytest.mark.parametrize(("family", "index"), [(family, i) for family, members in GOLDEN["levels"].items() for i in range(len(members))])
def test_skewed_levels(family: str, index: int) -> None:
    member = dict(GOLDEN["levels"][family][index])
    expected = torch.tensor(member.pop("levels"), dtype=torch.float64).float()  # the float32 next to the exact level
    fmt: NumberFormat = KINDS[family](**member)
    assert torch.equal(fmt.levels(), expected)


@pytest.mark.parametrize("name", list(GOLDEN["scores"]["tests"]))
def test_scores(name: str) -> None:
    case = GOLDEN["scores"]["tests"][name]
    reference = torch.tensor(GOLDEN["scores"]["features"], dtype=torch.float64)
    test = torch.tensor(case["values"], dtype=torch.float64)
    assert float(criteria.tdscore(reference, test)) == pytest.approx(case["tdscore"], abs=1e-6)  # returned as float32
    assert float(criteria.nmse(reference, test)) == pytest.approx(case["nmse"], rel=1e-5, abs=1e-12)  # computed in float32


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing(bits: int) -> None:
    case = GOLDEN["packing"][str(bits)]
    codes = torch.tensor(case["codes"], dtype=torch.uint8)
    assert pack(codes, bits).tolist() == case["bytes"]
    assert torch.equal(unpack(torch.tensor(case["bytes"], dtype=torch.uint8), bits, codes.shape[1]), codes)


def test_a_granularity_with_one_group_a_row_is_the_channel_granularity() -> None:
    weight = torch.tensor(GOLDEN["integers"]["weight"])
    grouped = fit(QuantSpec(parse_format("int8"), Granularity("group", 6)), weight)
    assert grouped.scale.tolist() == GOLDEN["integers"]["int8 channel"]["scale"]
    assert grouped(weight).flatten().tolist() == GOLDEN["integers"]["int8 channel"]["values"]
