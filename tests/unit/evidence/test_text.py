"""CLIP scores, with a tiny random CLIP that is saved and loaded as a real one would be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reelquant import CheckpointError, UnsupportedError
from reelquant._errors import MeasurementError
from reelquant.evidence.mechanisms import Tools
from reelquant.evidence.text import Clip, clip_scores, fetch_clip, frame_embeddings, load_clip, prepared, text_embedding


class Fixed:
    """A stand-in for CLIP that gives the embeddings it was told."""

    def __init__(self, pictures: torch.Tensor, words: torch.Tensor):
        self.pictures, self.words = pictures, words
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=4), text_config=SimpleNamespace(max_position_embeddings=8))
        self.device = torch.device("cpu")

    def parameters(self):
        return iter([torch.zeros(1)])

    def get_image_features(self, pixel_values):
        return self.pictures

    def get_text_features(self, input_ids, attention_mask):
        return self.words


class Tokens(dict):
    def to(self, device):
        return self


def test_both_scores_are_plain_cosines():
    model = Fixed(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0]]))
    tokenizer = lambda texts, **_: Tokens(input_ids=torch.zeros(1, 1), attention_mask=torch.ones(1, 1))  # noqa: E731
    scores = clip_scores(torch.zeros(3, 3, 4, 4), "a", Clip(model, tokenizer))
    assert scores["clipsim"] == pytest.approx((0.6 + 0.8 + 0.8) / 3)  # the text lies at (0.6, 0.8)
    assert scores["clip_consistency"] == pytest.approx((0 + 1) / 2)


def test_a_saved_clip_is_loaded_and_scores_depend_on_frames_and_text(tiny_clip: Path):
    clip = load_clip(tiny_clip)
    frames = torch.rand(3, 3, 20, 32)
    scores = clip_scores(frames, "a red circle", clip)
    assert -1 <= scores["clipsim"] <= 1 and -1 <= scores["clip_consistency"] <= 1
    assert clip_scores(frames, "a circle moving", clip)["clipsim"] != scores["clipsim"]
    assert clip_scores(frames[:1].expand(3, -1, -1, -1), "a red circle", clip)["clip_consistency"] == pytest.approx(1)
    assert not clip.model.training and not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_the_scores_are_those_of_transformers_own_forward(tiny_clip: Path):
    clip = load_clip(tiny_clip)
    frames = torch.rand(2, 3, 16, 16)
    tokens = clip.tokenizer(["a red circle"], return_tensors="pt")
    with torch.no_grad():
        output = clip.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=prepared(frames, 16))
    cosine = output.logits_per_image / clip.model.logit_scale.exp()
    assert clip_scores(frames, "a red circle", clip)["clipsim"] == pytest.approx(float(cosine.mean()), abs=1e-6)


def test_embeddings_have_length_one(tiny_clip: Path):
    clip = load_clip(tiny_clip)
    vectors = torch.cat([frame_embeddings(torch.rand(40, 3, 16, 16), clip), text_embedding("a", clip)[None]])
    assert vectors.shape == (41, 12) and torch.allclose(vectors.norm(dim=1), torch.ones(41, dtype=torch.float64))


def test_a_long_text_is_cut_off(tiny_clip: Path):
    clip = load_clip(tiny_clip)
    assert torch.equal(text_embedding("a " * 50, clip), text_embedding("a " * 8, clip))


def test_preparing_takes_the_middle_square_and_normalizes():
    frames = torch.zeros(1, 3, 8, 16)
    frames[..., 4:12] = 1
    expected = torch.tensor([(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711])
    assert torch.allclose(prepared(frames, 8), expected[:, None, None].expand(1, 3, 8, 8), atol=1e-5)


def test_preparing_differs_from_transformers_image_processor_by_8_bit_rounding():
    import transformers
    from PIL import Image

    Processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # noqa: N806
    processor = Processor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    levels = (torch.rand(3, 24, 40) * 127 + 64).byte()  # pillow clips between its two passes what bicubic overshoots
    theirs = torch.as_tensor(processor(Image.fromarray(levels.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"])
    ours = prepared(levels[None].float() / 255, 16)
    assert (theirs - ours).abs().max() <= 1.5 / 255 / 0.26  # two roundings to 8 bits, one after each axis


def test_no_frames_are_refused():
    with pytest.raises(MeasurementError, match="without frames"):
        clip_scores(torch.zeros(0, 3, 8, 8), "a", Clip(None, None))


def test_an_absent_clip_names_the_command_that_gets_it(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no config\.json; get it once with `reelquant weights clip`"):
        load_clip(tmp_path)
    with pytest.raises(CheckpointError, match="reelquant weights clip"):
        load_clip("nobody/no-such-clip")


def test_the_hub_is_not_asked_for_a_clip_that_was_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.http_get", lambda *_, **__: pytest.fail("a download began"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda url, **_: asked.append(url))
    with pytest.raises(CheckpointError, match="reelquant weights clip"):
        _ = Tools().clip
    assert not asked


def test_pickled_weights_are_refused(tiny_clip: Path, tmp_path: Path):
    for file in tiny_clip.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load a CLIP model"):
        load_clip(tmp_path)


def test_another_kind_of_model_is_told_from_a_clip(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedError, match="of type t5 and not a CLIP"):
        load_clip(tmp_path)


def test_a_fetched_clip_is_kept_as_safetensors_and_found_first(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    kept = fetch_clip(str(tiny_clip))
    assert kept.is_relative_to(tmp_path) and (kept / "model.safetensors").is_file()
    assert fetch_clip(str(tiny_clip)) == kept and list(kept.parent.iterdir()) == [kept]
    (kept / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot load a CLIP model"):
        load_clip(tiny_clip)


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REELQUANT_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot load a CLIP model from 'nobody/no-such-clip'"):
        fetch_clip("nobody/no-such-clip")
    assert not list(tmp_path.rglob("*"))
