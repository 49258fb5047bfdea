"""The model card of a quantized folder, and its way to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

import reelquant
from reelquant import CheckpointError
from reelquant.checkpoint import write_card
from reelquant.cli import app
from reelquant.models.manifest import CARD
from tests.tiny.stock import CALL, MIXED, PROMPTS, contents, room, stored_pipeline, wan_pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored_pipeline(tmp_path_factory.mktemp("card") / "wan")


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = reelquant.open_pipeline(source)
    report = reelquant.quantize(pipe, "w8a16", components=["transformer", "text_encoder"])
    return reelquant.save(pipe, tmp_path_factory.mktemp("card") / "out", report)


def test_a_card_says_what_was_quantized_and_how_to_open_it(folder: Path, source: Path) -> None:
    card = (folder / CARD).read_text()
    assert "# WanPipeline, quantized by w8a16" in card and 'DiffusionPipeline.from_pretrained("' in card
    rows = [line for line in card.splitlines() if line.startswith(("| transformer", "| text"))]
    report = json.loads((folder / "report.json").read_text())
    layers = sum(name["name"].startswith("transformer.") for name in report["layers"])
    assert f"int8 channel, inputs float: {layers} layers; float: " in rows[1] and "UMT5EncoderModel" in rows[0]
    bits = 32 * report["bytes_quantized"] / report["bytes_float"]
    assert f"{bits:.2f} bits for each" in card and f"{report['ratio']:.2f} times smaller" in card
    assert "prompt cosine: " in card and "PSNR" not in card  # measured: the one, and not the other
    assert str(source) not in card and "base_model" not in card  # a path of this machine means nothing elsewhere


def test_a_card_may_be_edited_and_is_not_written_again(folder: Path, tmp_path: Path) -> None:
    (folder / CARD).write_text("mine")
    reelquant.verify(folder)
    reelquant.open_pipeline(folder)
    write_card(folder)
    assert (folder / CARD).read_text() == "mine"
    reelquant.save(wan_pipeline(), tmp_path / "float")
    assert not (tmp_path / "float" / CARD).exists()


def test_both_ways_write_the_same_card_and_figures_of_calibration_stand_in_it(source: Path, tmp_path: Path) -> None:
    pipe = reelquant.open_pipeline(source)
    report = reelquant.quantize(pipe, MIXED, PROMPTS, **CALL)
    reelquant.save(pipe, tmp_path / "in-memory", report)
    reelquant.quantize_folder(source, tmp_path / "streamed", MIXED, PROMPTS, max_memory=room(), **CALL)
    one, other = (contents(tmp_path / name)[CARD].decode() for name in ("in-memory", "streamed"))
    assert one == other
    assert f"PSNR of the final latents of held-out clips to float: {report.latent_psnr:.1f} dB" in one
    assert "uint3 channel, inputs float: " in one and "int4 group-16, inputs uint8 tensor: " in one


def test_names_of_others_are_escaped_and_hub_ids_are_the_base_model(tmp_path: Path) -> None:
    pipe = wan_pipeline()
    pipe.register_to_config(_name_or_path='owner/na"me')
    evil = {"name": "<script>|`x`\n# big", "defaults": {"weight": {"format": "int8", "granularity": "channel"}}}
    report = reelquant.quantize(pipe, evil)
    card = (reelquant.save(pipe, tmp_path / "out", report) / CARD).read_text()
    assert "<script>" not in card and "\n# big" not in card and "&lt;script&gt;\\|\\`x\\` \\# big" in card
    assert 'base_model: "owner/na\\"me"' in card.splitlines() and "base_model_relation: quantized" in card


class Hub:
    """Remembers what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("log in", {"token": token}))

    def create_repo(self, repository: str, **how: Any) -> str:
        self.calls.append(("create", {"repository": repository, **how}))
        return f"https://hub/{repository}"

    def upload_folder(self, **how: Any) -> None:
        self.calls.append(("folder", how))

    def upload_file(self, **how: Any) -> None:
        self.calls.append(("file", how))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_folder_is_uploaded_without_a_path_of_this_machine(folder: Path, source: Path, hub: type[Hub]) -> None:
    assert reelquant.push_to_hub(folder, "me/wan-w8a16", private=True, token="secret") == "https://hub/me/wan-w8a16"
    made = dict(hub.calls)
    assert list(made) == ["log in", "create", "folder", "file"] and made["log in"] == {"token": "secret"}
    assert made["create"] == {"repository": "me/wan-w8a16", "private": True, "exist_ok": True}
    assert made["folder"]["folder_path"] == str(folder) and "report.json" in made["folder"]["ignore_patterns"]
    report = json.loads(made["file"]["path_or_fileobj"])
    assert (made["file"]["path_in_repo"] == "report.json" and report["recipe"] == "w8a16, w8a16") or report["recipe"] == "w8a16"
    assert "source" not in report and str(source) not in str(made["file"])
    (folder / "report.json").write_bytes(made["file"]["path_or_fileobj"])
    reelquant.verify(folder)  # the sum is that of what is left


def test_the_command_uploads_what_it_wrote(source: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    out, words = tmp_path / "out", ["quantize", str(source), "-r", "w8a16", "--push-to-hub", "me/wan", "-o"]
    monkeypatch.setenv("HF_TOKEN", "secret")
    made = CliRunner().invoke(app, [*words, str(out), "--json"])
    assert made.exit_code == 0 and json.loads(made.stdout)["repository"] == "https://hub/me/wan"
    asked = dict(hub.calls)
    assert asked["create"]["repository"] == "me/wan" and asked["folder"]["folder_path"] == str(out)
    assert (out / CARD).is_file() and CARD not in asked["folder"]["ignore_patterns"]
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: 1 / 0)
    made = CliRunner().invoke(app, [*words, str(tmp_path / "kept")])
    said = " ".join(made.output.split())
    assert made.exit_code == 1 and "ZeroDivisionError" in said and "the folder is complete; upload it in Python: reelquant.push" in said
    reelquant.verify(tmp_path / "kept")


def test_the_command_refuses_an_upload_that_cannot_be_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", str(source), "-r", "w8a16", "-o", str(tmp_path / "out"), "--push-to-hub"]
    for token, repository, said in ((None, "me/wan", "log in once: hf auth login"), ("secret", "wan", "give owner/name")):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda token=token: token)
        made = CliRunner().invoke(app, [*words, repository])
        assert made.exit_code == 1 and said in " ".join(made.output.split())
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_uploaded_is_said_before_and_after(folder: Path, tmp_path: Path, hub: type[Hub]) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        reelquant.push_to_hub(tmp_path, "me/wan")
    with pytest.raises(CheckpointError, match="'wan' is not the name of a repository; give owner/name"):
        reelquant.push_to_hub(folder, "wan")
    assert not hub.calls

    def refuse(self: Hub, repository: str, **how: Any) -> str:
        raise OSError("401: who are you")

    hub.create_repo, kept = refuse, hub.create_repo  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointError, match=r"cannot upload '.*' to 'me/wan': OSError: 401: who are you; log in once"):
            reelquant.push_to_hub(folder, "me/wan")
    finally:
        hub.create_repo = kept  # type: ignore[method-assign]


def test_a_damaged_folder_is_not_uploaded(source: Path, tmp_path: Path, hub: type[Hub]) -> None:
    pipe = reelquant.open_pipeline(source)
    out = reelquant.save(pipe, tmp_path / "out", reelquant.quantize(pipe, "w8a16"))
    (out / "model_index.json").write_text((out / "model_index.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        reelquant.push_to_hub(out, "me/wan")
    assert not hub.calls
