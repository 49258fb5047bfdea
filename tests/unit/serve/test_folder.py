"""Which paths the page opens: those within its folder, whatever the name or the links say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reelquant._errors import CheckpointError, ReelQuantError
from reelquant.models import pipelines
from reelquant.serve import folder as served
from reelquant.serve.folder import Folder
from tests.unit.serve.models import evaluation, pipeline


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text('{"quantization_config": {}}')
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


def refused(act: object, *words: object) -> str:
    with pytest.raises(ReelQuantError) as error:
        act(*words)  # type: ignore[operator]
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["..", "../outside/secret.json", "a/../../outside", "/etc/passwd", "", "a\0b", "link", "link/secret.json", "file"]
)
def test_paths_that_lead_out_are_refused(root: Path, name: str) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    (root / "file").symlink_to("../outside/secret.json")
    refused(Folder(root).inside, name)


def test_paths_within_and_links_within_are_followed(root: Path) -> None:
    pipeline(root / "blobs" / "model")
    (root / "link").symlink_to("blobs/model")
    assert Folder(root).inside("link/model_index.json") == root / "blobs" / "model" / "model_index.json"


def test_links_in_circles_are_one_clear_error(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    refused(Folder(root).inside, "a")


def test_a_model_with_a_file_elsewhere_is_refused_before_a_job_opens_it(root: Path) -> None:
    model = pipeline(root / "model")
    assert Folder(root).model("./model").name == "./model"
    (model / "transformer" / "weights.safetensors").symlink_to(root.parent / "outside" / "secret.json")
    assert refused(Folder(root).model, "./model").startswith("'model/transformer/weights.safetensors' is a link that leads out")


def test_a_model_with_code_of_its_own_is_refused(root: Path) -> None:
    (pipeline(root / "model") / "transformer" / "mine.py").write_text("")
    assert "'model/transformer/mine.py' is Python code" in refused(Folder(root).model, "./model")


def test_models_are_listed_with_what_their_reports_say(root: Path) -> None:
    float_ = pipeline(root / "wan")
    pipeline(root / "deep" / "er" / "wan-q", recipe="w8a16", source=str(float_))
    pipeline(root / "dit-q", recipe="qvd-w8a8", source="tiny-dit")
    pipeline(root / "elsewhere-q", recipe="w8a16", source="/somewhere/else")
    pipeline(root / ".hidden")
    pipeline(root / "dit-q" / "not-looked-into")
    (root / "linked").symlink_to(root.parent / "outside")
    found = {one.name: (one.label, one.source) for one in Folder(root).models()}
    assert found == {
        "tiny-dit": ("tiny-dit (bundled)", ""),
        "tiny-unet": ("tiny-unet (bundled)", ""),
        "./dit-q": ("dit-q (qvd-w8a8)", "tiny-dit"),
        "./elsewhere-q": ("elsewhere-q (w8a16)", ""),
        "./wan": ("wan", ""),
        "./deep/er/wan-q": ("deep/er/wan-q (w8a16)", "./wan"),
    }


def test_the_bundled_names_are_those_of_the_library() -> None:
    assert served.BUNDLED == pipelines.BUNDLED


def test_a_component_behind_a_link_that_leads_out_is_not_read(root: Path) -> None:
    model = pipeline(root / "model")
    (root.parent / "outside" / "config.json").write_text('{"quantization_config": {}}')
    (model / "vae").symlink_to(root.parent / "outside")
    assert [one.quantized for one in Folder(root).models() if one.name == "./model"] == [False]


def test_a_choice_that_is_not_offered_is_refused(root: Path) -> None:
    pipeline(root / "q", recipe="w8a16")
    (root / "sub").mkdir()
    offered = Folder(root)
    assert "without '..'" in refused(offered.model, "../outside")
    assert "nothing at 'owner/name'" in refused(offered.model, "owner/name")
    assert "no pipeline './sub'" in refused(offered.model, "./sub")
    assert "no float pipeline './q'" in refused(lambda: offered.model("./q", quantized=False))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", ".hidden", "a/.b", "a/../b", "taken", "link/x", "a\nb"])
def test_new_folders_are_made_within_and_never_over_others(root: Path, name: str) -> None:
    (root / "taken").mkdir()
    (root / "link").symlink_to(root.parent / "outside")
    refused(Folder(root).new, name)


def test_new_names_may_have_folders_and_free_names_count_on(root: Path) -> None:
    assert Folder(root).new("a/b c") == "a/b c"
    (root / "x").mkdir()
    (root / "x-2.partial").mkdir()
    assert Folder(root).free("x") == "x-3"
    assert Folder(root).new("x", again=True) == "x"


RECIPE = "name: mine\nextends: {parent}\n"


@pytest.mark.parametrize(
    ("parent", "allowed"),
    [
        ("w8a16", True),
        ("base.yaml", True),
        ("../base.yaml", False),
        ("../../outside/x.yaml", False),
        ("/etc/x.yaml", False),
        ("link.yaml", False),
    ],
)
def test_recipes_are_names_or_files_within_and_so_are_those_they_extend(root: Path, parent: str, allowed: bool) -> None:
    (root / "base.yaml").write_text(RECIPE.format(parent="w8a16"))
    (root / "link.yaml").symlink_to(root.parent / "outside" / "x.yaml")
    (root.parent / "base.yaml").write_text(RECIPE.format(parent="w8a16"))
    (root.parent / "outside" / "x.yaml").write_text(RECIPE.format(parent="w8a16"))
    (root / "mine.yaml").write_text(RECIPE.format(parent=parent))
    offered = Folder(root)
    assert "./link.yaml" not in offered.recipes() and "./mine.yaml" in offered.recipes()
    if allowed:
        assert offered.recipe("./mine.yaml") == "./mine.yaml"
    else:
        assert "outside of the served folder" in refused(offered.recipe, "./mine.yaml")


def test_recipes_in_a_circle_are_one_clear_error(root: Path) -> None:
    (root / "a.yaml").write_text(RECIPE.format(parent="b.yaml"))
    (root / "b.yaml").write_text(RECIPE.format(parent="a.yaml"))
    assert "in a circle" in refused(Folder(root).recipe, "./a.yaml")


def test_the_page_does_not_write_through_links(root: Path) -> None:
    (root / ".reelquant").symlink_to(root.parent / "outside")
    assert "does not write through links" in refused(Folder(root).own, "jobs")


def test_evaluations_are_found_newest_first(root: Path) -> None:
    for age, name in enumerate(["new", "sub/old"]):
        os.utime(evaluation(root / name) / "report.json", (1e9 - age, 1e9 - age))
    pipeline(root / "model", recipe="w8a16")  # has a report.json, too
    assert Folder(root).evaluations() == ["new", "sub/old"]


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder at"):
        Folder(tmp_path / "nowhere")
