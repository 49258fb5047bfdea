from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from reelquant._errors import SiteError
from reelquant.sites import ROLES, DenoiserMap, Group, Layer, Role, matches, select


def layer(name: str, role: Role = "main", kind: str = "Linear") -> Layer:
    return Layer(name, kind, role, frozenset({"latent"}), (4, 4))


LAYERS = [
    layer("conv_in", "entry", "Conv2d"),
    layer("time_embedding.linear_1", "temporal"),
    layer("blocks.0.attn1.to_q"),
    layer("blocks.0.attn1.to_k"),
    layer("blocks.0.attn2.to_k", "prompt"),
    layer("blocks.0.ffn.conv", kind="Conv2d"),
    layer("blocks.1.attn1.to_q"),
    layer("blocks.10.attn1.to_q"),
    layer("proj_out", "exit"),
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv_in", ["conv_in"]),
        ("blocks.1", ["blocks.1.attn1.to_q"]),  # a module stands for what is below it, not for blocks.10
        ("blocks.*.to_q", ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.10.attn1.to_q"]),
        ("blocks.?.attn1.to_q", ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]),
        ("role:temporal", ["time_embedding.linear_1"]),
        ("role: prompt", ["blocks.0.attn2.to_k"]),
        ("class:Conv2d", ["conv_in", "blocks.0.ffn.conv"]),
        ("role:entry | role:exit", ["conv_in", "proj_out"]),
        ("class:Conv2d & role:main", ["blocks.0.ffn.conv"]),
        ("blocks.0 & !*.attn1.*", ["blocks.0.attn2.to_k", "blocks.0.ffn.conv"]),
        ("!role:main", ["conv_in", "time_embedding.linear_1", "blocks.0.attn2.to_k", "proj_out"]),
        ("maybe:*.to_q", ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.10.attn1.to_q"]),
        ("maybe:*.proj_in | conv_in | maybe: nothing", ["conv_in"]),
        ("blocks.0 & !maybe:*.attn1.*", ["blocks.0.attn2.to_k", "blocks.0.ffn.conv"]),
        ("! role:main & !role:entry|conv_in", ["conv_in", "time_embedding.linear_1", "blocks.0.attn2.to_k", "proj_out"]),
        (r"re:blocks\.\d\..*", [x.name for x in LAYERS[2:7]]),
        (r"re:blocks\.(1|10)\..*", ["blocks.1.attn1.to_q", "blocks.10.attn1.to_q"]),
        (r"role:main & re:.*\.(to_k|conv)", ["blocks.0.attn1.to_k", "blocks.0.ffn.conv"]),
        (r"conv_in | re:blocks\.1\..*|proj_out", ["conv_in", "blocks.1.attn1.to_q", "proj_out"]),
        (r"!re:blocks\..*|conv_in", ["time_embedding.linear_1", "proj_out"]),  # the regex runs to the end
        ("re:to_q", None),  # a regex matches the full name
        ("Blocks.0", None),  # names are case sensitive
        ("blocks.2", None),
    ],
)
def test_patterns(pattern: str, expected: list[str] | None) -> None:
    if expected is None:
        assert not any(matches(pattern, x) for x in LAYERS)
    else:
        assert list(select(pattern, LAYERS)) == expected


def test_the_last_block_is_named_by_what_discovery_found() -> None:
    layers = [replace(one, last=one.name.startswith("blocks.10.")) for one in LAYERS]
    assert select("block:last & role:main", layers) == ("blocks.10.attn1.to_q",)
    assert select("block: last | conv_in", layers) == ("conv_in", "blocks.10.attn1.to_q")
    assert select("block:last", LAYERS) == ()  # where it is not known
    assert select("block:end", layers) == ()
    assert select("block:end", [replace(one, end=one.name == "conv_in") for one in layers]) == ("conv_in",)
    with pytest.raises(SiteError, match="pattern 'block:0' names no place of blocks; known: last, end"):
        select("block:0", LAYERS)


def test_a_pattern_that_names_no_layer_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(SiteError, match=r"pattern 'blocks.0.atn1.to_q' matches none of 9 layers; did you mean 'blocks.0.attn1.to_q'\?"):
        select("blocks.0.atn1.to_q", LAYERS)


def test_a_role_or_class_that_no_layer_has_selects_nothing() -> None:
    assert select("role:constant | class:Conv3d", LAYERS) == ()
    assert select("!role:main & role:constant", LAYERS) == ()


def test_a_layer_name_among_roles_still_has_to_exist() -> None:
    with pytest.raises(SiteError, match="matches none"):
        select("role:constant | blcks.0", LAYERS)


def test_every_alternative_that_names_layers_has_to_exist() -> None:
    with pytest.raises(SiteError, match=r"pattern 'blocks.\*.to_qq' matches none of 9 layers"):
        select("blocks.*.to_k | blocks.*.to_qq", LAYERS)
    with pytest.raises(SiteError, match="pattern 'role:main & conv_in' matches none"):
        select("proj_out | role:main & conv_in", LAYERS)


def test_a_layer_that_may_be_missing_is_no_error() -> None:
    assert select("maybe:*.proj_in | maybe:*.conv_shortcut", LAYERS) == ()


@pytest.mark.parametrize("pattern", ["role:temporl", "!role:temporl"])
def test_an_unknown_role_is_an_error_with_the_nearest_role(pattern: str) -> None:
    with pytest.raises(SiteError, match=r"unknown role in pattern 'role:temporl'; did you mean 'temporal'\?"):
        select(pattern, LAYERS)


def test_an_invalid_regex_is_a_site_error_that_says_why() -> None:
    with pytest.raises(SiteError, match=r"'re:blocks\.\(0' is not a regular expression: missing \), unterminated subpattern"):
        select("re:blocks.(0", LAYERS)


@pytest.mark.parametrize("pattern", ["", "  ", "role:main |", "& role:main", "role:main & !", "conv_in||proj_out"])
def test_an_empty_term_is_an_error(pattern: str) -> None:
    with pytest.raises(SiteError, match="has an empty term"):
        select(pattern, LAYERS)


def test_the_map_finds_groups_and_roles() -> None:
    qk = Group(("blocks.0.attn1.to_q", "blocks.0.attn1.to_k"), "main")
    found = DenoiserMap("Tiny", {x.name: x for x in LAYERS}, (qk,))
    assert qk.name == "blocks.0.attn1.to_q"
    assert found.group_of("blocks.0.attn1.to_k") is qk
    assert found.by_role("exit") == ("proj_out",)
    assert {x for role in ROLES for x in found.by_role(role)} == {x.name for x in LAYERS}
    with pytest.raises(SiteError, match=r"layer 'proj_ou' is in no group of Tiny; did you mean 'proj_out'\?"):
        found.group_of("proj_ou")


def test_addresses_do_not_need_torch() -> None:
    """A map is plain data: the module is loaded here without the package around it, which does import torch."""
    code = (
        "import importlib.util, pathlib, sys, types\n"
        "package = types.ModuleType('reelquant'); package.__path__ = [sys.argv[1]]; sys.modules['reelquant'] = package\n"
        "import reelquant.sites\n"
        "sys.exit('torch' in sys.modules)"
    )
    source = sys.modules["reelquant"].__path__[0]
    assert subprocess.run([sys.executable, "-c", code, source], check=False).returncode == 0
