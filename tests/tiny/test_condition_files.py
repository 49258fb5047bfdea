"""Clips made from files of conditions, by the command line: quantize, generate and evaluate in one command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from reelquant.cli import app
from reelquant.models.sampling import write_notes
from tests.tiny.conditioned import CASES, FACE, PROMPTLESS, made, picture

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # schedulers of diffusers
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]
FEW = ("--set", "calibrate.prompts=2", "--set", "search.prompts=1")
PICTURES = [
    {"prompt": "a red ball", "image": "p0.png"},
    {"prompt": "a blue box", "image": "p1.png", "negative_prompt": "a ball", "seed": 7},
    {"caption": "a ball", "first_frame": "p2.png", "name": "third", "category": "ours"},
]
FACES = {"image": "p0.png", "id_cond": "face.safetensors", "id_vit_hidden": "face-hidden.safetensors"}


FRAMES = {"video": "five", "mask": "five", "reference_image": "p1.png"}


class Case(NamedTuple):
    """Lines of a file for one of :data:`CASES`, the argument they become, and what is quantized."""

    lines: list[dict[str, Any]]
    argument: str
    component: str | None = None


full = pytest.mark.full
TABLE = {
    "svd": Case([{"image": "p0.png"}, {"image": "p1.png"}, {"image": "p2.png"}], "image"),
    "dit": Case([{"class": 3}, {"class_label": 700}, {"class_labels": 5}], "class_labels"),
    "wan_i2v": Case(PICTURES, "image"),
    "i2vgen": Case(PICTURES, "image", "unet,image_encoder"),
    "ltx_i2v": Case(PICTURES, "image"),
    "ltx_condition": Case([{"prompt": "a ball", "video": "frames0"}, {"prompt": "a box", "video": "frames1"}], "video"),
    "cogvideox_i2v": Case(PICTURES, "image"),
    "cogvideox_v2v": Case([{"prompt": "a ball", "video": "nine"}, {"prompt": "a box", "video": "nine", "strength": 0.9}], "video"),
    "consisid": Case([{"prompt": "a red ball"} | FACES, {"prompt": "a box"} | FACES], "id_cond"),
    "wan_vace": Case([{"prompt": "a ball"} | FRAMES, {"prompt": "a box"} | FRAMES], "video"),
    "animatediff_controlnet": Case(
        [{"prompt": "a ball", "control_video": "frames0"}, {"prompt": "a box", "video": "frames1"}],
        "conditioning_frames",
        "unet,controlnet",
    ),
    "sd_controlnet": Case([{"prompt": "a ball", "control_image": "p0.png"}, {"prompt": "a box", "image": "p1.png"}], "image", "controlnet"),
}
SHORT = ("svd", "sd_controlnet", "dit")  # the others run in `make test-all`


def invoke(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, folders of frames and tensors that conditions name."""
    folder = tmp_path_factory.mktemp("media")
    for i, red in enumerate((200, 20, 120)):
        picture(red).save(folder / f"p{i}.png")
    for name, count, red in (("frames0", 3, 50), ("frames1", 3, 90), ("five", 5, 30), ("nine", 9, 10)):
        (folder / name).mkdir()
        for i in range(count):
            picture(red + 20 * i).save(folder / name / f"{i}.png")
    save_file({"face": torch.linspace(-1, 1, FACE)[None]}, folder / "face.safetensors")
    save_file({str(i): torch.ones(1, 3, FACE) / (i + 1) for i in range(2)}, folder / "face-hidden.safetensors")
    return folder


def stored(name: str, folder: Path) -> Path:
    """One of :data:`CASES` on disk, with notes on how it likes to be called."""
    made(name).save_pretrained(folder / name)
    write_notes(folder / name, CASES[name].settings, [] if name in PROMPTLESS else ["a red ball", "a blue box"])
    return folder / name


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=full) for name in TABLE])
def test_one_command_each(name: str, media: Path, tmp_path: Path) -> None:
    case, model = TABLE[name], stored(name, tmp_path)
    file = media / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, case.lines)))
    component = () if case.component is None else ("--component", case.component)
    made = invoke("quantize", model, "-r", "minmax-w8a8", "-o", tmp_path / "out", "--conditions", file, *FEW, *component)
    assert made["latent_psnr"] > 25
    assert set(made["parts"] or {made["component"]: 0}) == set((case.component or made["component"]).split(","))
    assert case.argument in made["conditions"]["calibration"][0]
    clips = invoke("generate", tmp_path / "out", "--conditions", file, "-o", tmp_path / "made" / "clip.gif")["clips"]
    assert len(clips) == len(case.lines) and all(Path(clip["files"][0]).is_file() for clip in clips)
    found = invoke(
        "evaluate", tmp_path / "out", "--reference", model, "--prompts", file, "-o", tmp_path / "proof", "-m", "psnr", "--floor", "none"
    )
    assert found["psnr"] > 25 and len(found["conditions"]) == len(case.lines)
    assert found["conditions"][0].keys() >= {case.argument}


def test_a_changed_picture_is_another_evaluation(media: Path, tmp_path: Path) -> None:
    """Provenance covers what the files hold: the same name with other content is not the same condition."""
    model = stored("svd", tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(200).save(folder / "a.png")
    invoke("quantize", model, "-r", "w8a16", "-o", tmp_path / "out")
    both = (tmp_path / "out", "--reference", model)
    words = ("evaluate", *both, "--prompts", folder, "-o", tmp_path / "proof", "-m", "psnr", "--floor", "none")
    first = invoke(*words)
    assert invoke(*words, "--resume")["psnr"] == first["psnr"]
    picture(20).save(folder / "a.png")
    refused = CliRunner().invoke(app, [*map(str, words), "--resume"])
    assert refused.exit_code == 1 and "conditions was" in refused.output, refused.output


def test_generate_joins_a_text_and_a_picture_and_asks_for_what_is_missing(media: Path, tmp_path: Path) -> None:
    model, file = stored("wan_i2v", tmp_path), media / "texts.jsonl"
    file.write_text(json.dumps(PICTURES[0]))
    words = ("generate", model, "-o", tmp_path / "clip.gif")
    made = invoke(*words, "-p", "a red ball", "--conditions", media / "p1.png")
    assert made["prompt"] == "a red ball" and list(made["conditions"]) == ["image"] and (tmp_path / "clip.gif").is_file()
    for more, message in (
        (("-p", "a red ball"), "needs 'image' for every clip and got none"),
        (("-p", "a red ball", "--conditions", file), "text of its own"),
        (("--conditions", media / "p1.png"), "already exists"),
    ):
        refused = CliRunner().invoke(app, [*map(str, words), *map(str, more)])
        assert refused.exit_code in (1, 2) and message in " ".join(refused.output.replace("│", " ").split()), refused.output


def test_a_folder_without_its_text_encoder_works_on_embeddings_in_files(tmp_path: Path) -> None:
    pipe = made("wan_vace")
    text, nothing = pipe.encode_prompt(["a red ball"], negative_prompt=[""], max_sequence_length=8)
    save_file({"x": text[0].contiguous()}, tmp_path / "text.safetensors")
    save_file({"x": nothing.contiguous()}, tmp_path / "nothing.safetensors")
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "float")
    write_notes(tmp_path / "float", CASES["wan_vace"].settings, [])
    file = tmp_path / "clips.jsonl"
    row = {"prompt": "a red ball", "prompt_embeds": "text.safetensors", "negative_prompt_embeds": "nothing.safetensors"}
    file.write_text(json.dumps(row))
    found = [
        invoke("quantize", tmp_path / "float", "-r", "minmax-w8a8", "-o", tmp_path / name, "--conditions", file, *FEW, *more)
        for name, more in (("memory", ()), ("disk", ("--resume",)))
    ]
    assert found[0]["latent_psnr"] == found[1]["latent_psnr"] > 25 and found[0]["prompts"] == ["a red ball"]
    clip = invoke("generate", tmp_path / "memory", "--conditions", file, "-o", tmp_path / "clip.gif")
    assert clip["conditions"].keys() == {"prompt_embeds", "negative_prompt_embeds"}
