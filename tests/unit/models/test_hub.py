"""Hub ids: what a pipeline takes is known before it is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest

from reelquant.models.conditions import takes_prompt
from reelquant.models.pipelines import pipeline_class


def test_the_class_of_a_hub_id_is_read_from_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}), encoding="utf-8")
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any) -> str:
        asked.append(arguments)
        return str(tmp_path / arguments[1])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = pipeline_class("owner/name")
    assert found is diffusers.DiTPipeline and not takes_prompt(found) and asked == [("owner/name", "model_index.json")]


def test_where_the_hub_cannot_be_reached_the_class_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert pipeline_class("owner/name") is diffusers.DiffusionPipeline
