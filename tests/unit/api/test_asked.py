"""Wrong names and wrong kinds of arguments are refused before anything is opened, with what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import reelquant
from reelquant import UnsupportedError, api
from reelquant.models import pipelines
from tests.tiny.stock import stored_pipeline, wan_pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return wan_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("asked") / "wan")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipeline can be opened."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was opened")

    monkeypatch.setattr(pipelines, "open_pipeline", refuse)


VERBS = {  # verb and arguments -> a keyword with a slip, and the name that is meant
    "evaluate": ((Path, Path), "clip", "clips"),
    "compare": ((Path, Path), "metric", "metrics"),
    "benchmark": ((Path, Path), "round", "rounds"),
    "quantize_folder": ((Path, Path, "w8a16"), "num_inference_step", "num_inference_steps"),
    "open_pipeline": ((Path,), "dtyp", "dtype"),
    "load": ((Path,), "dtyp", "dtype"),
    "verify": ((Path,), "renow", "renew"),
    "export": ((Path, "gguf", "out.gguf"), "forse", "force"),
    "quantize": ((object, "w8a16"), "component", "components"),
    "plan": ((object, "w8a16"), "skp", "skip"),
    "plans": ((object, "w8a16"), "overides", "overrides"),
    "save": ((object, "out"), "forse", "force"),
    "configure": ((object,), "kernel", "kernels"),
}


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_keyword_is_refused_with_the_nearest_name(verb: str, pipe: Any, folder: Path) -> None:
    places, wrong, right = VERBS[verb]
    arguments = [{Path: folder, object: pipe}.get(one, one) for one in places]  # type: ignore[call-overload]
    with pytest.raises(UnsupportedError, match=f"takes no argument '{wrong}'; .*did you mean '{right}'"):
        getattr(api, verb)(*arguments, **{wrong: 3})


def test_names_of_the_call_are_those_of_the_pipeline_and_of_its_notes(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"WanPipeline takes no argument 'fps'; nor does reelquant\.plan; "):
        reelquant.plan(pipe, "w8a16", fps=8)
    noted = stored_pipeline(tmp_path / "wan")
    (noted / "reelquant.json").write_text('{"call": {"fps": 8}, "prompts": []}')
    report = reelquant.quantize_folder(noted, tmp_path / "out", "w8a16", num_frames=5)
    assert report.layers
    assert reelquant.plan(pipe, "w8a16", num_frames=5, fps=None).quantized  # None is the same as not given


KINDS = {  # what is given where a pipeline is expected -> a part of the answer
    "text": ("tiny-dit", "got 'tiny-dit'; open it first: reelquant.open_pipeline('tiny-dit')"),
    "module": (torch.nn.Linear(2, 2), "bare module (Linear); give the pipeline that it belongs to, or .* reelquant.Denoiser(module"),
    "nothing": (None, "got None; open one"),
    "number": (3, "got 3; open one"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", [api.quantize, api.plan, api.plans])
def test_what_is_no_pipeline_is_named(verb: Any, kind: str) -> None:
    given, answer = KINDS[kind]
    with pytest.raises(UnsupportedError, match=f"{verb.__name__} takes a pipeline.*{answer.replace('(', '[(]').replace(')', '[)]')}"):
        verb(given, "w8a16")


def test_every_verb_that_opens_a_folder_refuses_an_object(pipe: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"quantize_folder takes the folder.* an object of WanPipeline; reelquant.quantize takes one"
    ):
        reelquant.quantize_folder(pipe, tmp_path / "out", "w8a16")
    with pytest.raises(UnsupportedError, match="reference of benchmark takes the folder"):
        reelquant.benchmark(folder, pipe)
    with pytest.raises(UnsupportedError, match=r"compare takes folders of clips.*reelquant.evaluate takes pipelines"):
        reelquant.compare(pipe, folder)
    with pytest.raises(UnsupportedError, match="reference of compare takes folders of clips"):
        reelquant.compare(folder, pipe)


def test_both_sides_of_an_evaluation_and_the_model_of_other_verbs_are_looked_at(pipe: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"takes one pipeline, got 2; reelquant.evaluate_several takes several"):
        reelquant.evaluate([folder, folder])
    with pytest.raises(UnsupportedError, match=r"takes a list of quantized pipelines.*reelquant.evaluate takes one"):
        reelquant.evaluate_several(folder)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="evaluate takes a pipeline, got a bare module"):
        reelquant.evaluate(pipe.transformer, folder)
    with pytest.raises(UnsupportedError, match="reference of evaluate takes a pipeline, got a bare module"):
        reelquant.evaluate(folder, pipe.transformer)
    with pytest.raises(UnsupportedError, match="save takes a pipeline, got a bare module"):
        reelquant.save(pipe.transformer, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="configure takes a pipeline in memory"):
        reelquant.configure("tiny-dit", kernels="auto")
    with pytest.raises(UnsupportedError, match="saturation takes a pipeline in memory"), reelquant.saturation("tiny-dit"):
        pass


def test_a_pipeline_that_is_quantized_already_is_said_to_be(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    reelquant.quantize(pipe, "w8a16")
    again = r"component 'transformer' is quantized already \(\d+ layers by recipe 'w8a16'\).*float weights are gone; open the float"
    for verb in (api.quantize, api.plan):
        with pytest.raises(UnsupportedError, match=again):
            verb(pipe, "w4a16")
    opened = reelquant.open_pipeline(reelquant.save(pipe, tmp_path / "out"))
    with pytest.raises(UnsupportedError, match=again):
        reelquant.quantize(opened, "w4a16")


def test_no_verb_hides_the_names_that_it_takes() -> None:
    import inspect

    names = [name for name in api.__all__ if name != "folder_job"]
    passing = {"call"}  # arguments of the pipeline
    kinds = {name: inspect.signature(getattr(api, name)).parameters.values() for name in names}
    hidden = {name: {one.name for one in given if one.kind is one.VAR_KEYWORD} - passing for name, given in kinds.items()}
    assert not any(hidden.values()), hidden


def test_both_verbs_that_compare_take_the_test_first() -> None:
    import inspect

    for verb in (api.evaluate, api.compare, api.benchmark):
        assert list(inspect.signature(verb).parameters)[:2] == ["test", "reference"]


def test_weights_alone_are_rounded_without_a_call_of_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the pipeline was called")

    pipe = wan_pipeline()
    monkeypatch.setattr(type(pipe), "__call__", refuse)
    mine = {"name": "mine", "defaults": {"weight": {"format": "int8", "granularity": "channel"}, "input": None}}
    report = reelquant.quantize(pipe, mine)
    assert set(report.seconds) == {"build"} and report.layers
