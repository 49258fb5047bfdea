"""Methods of others: the example of the documentation is run as it stands, and a pipeline that needs one says which."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError, UnsupportedError, _plugins
from reelquant._remarks import remarks
from reelquant.cli import app
from reelquant.formats import FORMATS, parse_format
from reelquant.models.manifest import MANIFEST
from reelquant.recipes.recipe import load_recipe
from reelquant.reconstruct import RECONSTRUCTIONS
from reelquant.solvers import SOLVERS
from reelquant.transforms import TRANSFORMS
from tests.tiny.stock import stored_pipeline

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
NF4 = [  # of the authors' code
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tables, and what was imported, are afterwards as they were."""
    tables: list[dict[str, Any]] = [FORMATS, SOLVERS, TRANSFORMS, RECONSTRUCTIONS, sys.modules]  # type: ignore[list-item]
    before = [dict(table) for table in tables]
    monkeypatch.setattr(_plugins, "_named", [])
    yield
    for table, old in zip(tables, before, strict=True):
        for name in table.keys() - old.keys():
            if table is not sys.modules or name.startswith("my_"):
                del table[name]


def written(folder: Path) -> tuple[Path, Path]:
    """The files of the guide, by the name in their first line: every block of Python and YAML is one."""
    text = GUIDE.read_text()
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", text, re.S)
    assert len(blocks) == len(re.findall(r"^```(?:python|yaml)$", text, re.M))
    for name, content in blocks:
        (folder / name).write_text(content)
    return folder / "my_methods.py", folder / "my-nf4.yaml"


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.usefixtures("restored")
def test_the_solver_and_the_format_of_the_guide_work_as_they_stand(tmp_path: Path) -> None:
    plugin, recipe = written(tmp_path)
    source, out = stored_pipeline(tmp_path / "wan"), tmp_path / "out"
    made = command("--plugin", plugin, "quantize", source, "-r", recipe, "-o", out)
    assert made.exit_code == 0, made.output
    assert parse_format("nf4").table.tolist() == pytest.approx(NF4, abs=2e-4)  # theirs are rounded in their own way
    report = json.loads((out / "report.json").read_text())
    assert {layer["solver"] for layer in report["layers"] if layer["role"] == "main"} == {"shrunk"}
    assert {layer["weight"] for layer in report["layers"]} == {"nf4 group-64"}
    stored = json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]
    assert stored["plugins"] == {"format nf4": "my_methods"}
    found = reelquant.evaluate(out, clips=1, metrics="psnr", floor=["none"], num_inference_steps=1)
    assert found["psnr"] > 20

    del FORMATS["nf4"], SOLVERS["shrunk"], sys.modules["my_methods"]  # another process
    _plugins._named.clear()
    needs = (
        r"needs the format 'nf4' of the plug-in 'my_methods', which is not imported; .* import my_methods \(reelquant --plugin my_methods"
    )
    with pytest.raises(CheckpointError, match=needs):
        reelquant.open_pipeline(out)
    said = command("evaluate", out, "-o", tmp_path / "proof")
    assert re.search(needs, said.stderr.replace("\n", " ")), said.stderr
    assert not (tmp_path / "proof").exists()  # it was said before anything was sampled
    assert command("--plugin", plugin, "verify", out).exit_code == 0 and reelquant.open_pipeline(out)


@pytest.mark.usefixtures("restored")
def test_the_transform_and_the_reconstruction_of_the_guide_work_as_they_stand(tmp_path: Path) -> None:
    written(tmp_path)
    source, out = stored_pipeline(tmp_path / "wan"), tmp_path / "out"
    plugins = [word for name in ("my_transform.py", "my_reconstruction.py") for word in ("--plugin", tmp_path / name)]
    made = command(*plugins, "quantize", source, "-r", tmp_path / "my-trained.yaml", "-o", out)
    assert made.exit_code == 0, made.output
    main = [layer for layer in json.loads((out / "report.json").read_text())["layers"] if layer["role"] == "main"]
    assert any(layer["solver"] == "factor" for layer in main)  # where held-out calls did not get better, codes stay
    pipe = reelquant.open_pipeline(out)  # needs no plug-in: nothing of them is left in the layers
    scales = [float(value.max()) for name, value in pipe.transformer.state_dict().items() if name.endswith("pre_quant_scale")]
    assert scales and set(scales) <= {1.0, 2.0} and 2.0 in scales


def test_the_recipes_of_the_guide_are_recipes(tmp_path: Path) -> None:
    written(tmp_path)
    assert load_recipe(tmp_path / "my-method.yaml").search.scope == "family"
    assert load_recipe(tmp_path / "my-w4a8.yaml").steps[2].options["power"] == [0.25, 0.5]


@pytest.mark.usefixtures("restored")
def test_the_solver_of_the_guide_never_loses_to_rounding_with_the_whole_range(tmp_path: Path) -> None:
    import torch

    from reelquant.formats import QuantSpec, parse_granularity
    from reelquant.solvers import Problem

    _plugins.load_plugin(str(written(tmp_path)[0]))
    _plugins.load_plugin(str(tmp_path / "my_methods.py"))  # twice is once
    problem = Problem(torch.randn(8, 64), QuantSpec(parse_format("int4"), parse_granularity("channel", 0)))
    solved, nearest = (problem.objective(SOLVERS[name]().solve(problem).values) for name in ("shrunk", "nearest"))
    assert solved < nearest


def test_a_plug_in_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ValueError('of its own')")
    for name, reason in (("no_such_module_here", "ModuleNotFoundError"), (tmp_path / "broken.py", "ValueError: of its own"), ("no.py", "")):
        said = command("--plugin", name, "recipes")
        assert said.exit_code == 1 and said.stderr.startswith(f"reelquant: plug-in '{name}' cannot be loaded") and reason in said.stderr
    assert "broken" not in sys.modules
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UnsupportedError, match="a module called 'json' is imported already"):
        _plugins.load_plugin(str(tmp_path / "json.py"))


def test_entry_points_are_loaded_before_the_first_recipe_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def fail() -> None:
        raise ImportError("of another version")

    points = [
        SimpleNamespace(name="good", value="good.methods", load=lambda: loaded.append("good")),
        SimpleNamespace(name="bad", value="bad.methods", load=fail),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "reelquant.plugins" else [])
    monkeypatch.setitem(_plugins._state, "installed", False)
    with remarks() as told:
        load_recipe("w8a16")
        load_recipe("w4a16")
    assert loaded == ["good"]
    assert told == ["plug-in 'bad' (bad.methods) cannot be loaded and is left out: ImportError: of another version"]


def test_a_checkpoint_that_names_no_plug_in_says_what_is_unknown(tmp_path: Path) -> None:
    """Of a version before plug-ins were recorded, or of a later one that has more formats."""
    pipe = reelquant.open_pipeline(stored_pipeline(tmp_path / "wan"))
    out = reelquant.save(pipe, tmp_path / "out", reelquant.quantize(pipe, "w8a16"))
    file = out / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"format": "int8"', '"format": "int9"'))
    (out / MANIFEST).unlink()
    with pytest.raises(
        CheckpointError, match=r"group_0 cannot be read: unknown number format 'int9'.*import the package that registers it"
    ):
        reelquant.open_pipeline(out)
