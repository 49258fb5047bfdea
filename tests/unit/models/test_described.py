from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reelquant.models.described import described, packed, unpacked


@dataclasses.dataclass
class Condition:
    image: Any
    index: int = 0


def test_settings_stay_as_they_are() -> None:
    call = {"height": 32, "guidance_scale": 1.5, "sigmas": [1.0, 0.5], "mode": "animate", "more": {"deep": True}, "none": None}
    assert described(call) == call and json.loads(json.dumps(described({"size": (1, 2)}))) == described({"size": (1, 2)})


@pytest.mark.parametrize(
    ("value", "same", "other", "words"),
    [
        (Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), (0, 0, 1)), "picture 4x2 RGB, sha256 "),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.eye(3)[:, :2], "float32 [3, 2], sha256 "),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), "bfloat16 [2], sha256 "),
        (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), np.eye(2, dtype=np.uint8), "uint8 [2, 2], sha256 "),
    ],
)
def test_content_decides(value: Any, same: Any, other: Any, words: str) -> None:
    assert described(value).startswith(words) and described(value) == described(same) != described(other)
    assert described([Condition(value)]) == [{"image": described(value), "index": 0}]


def test_views_are_what_they_show() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    assert described(whole.T) == described(whole.T.clone()) and described(torch.tensor(1.0)).startswith("float32 [], ")


def test_whole_values_come_back_from_json() -> None:
    call = {"image": [Image.linear_gradient("L").convert("RGB")], "latents": torch.randn(2, 3), "steps": 3, "deep": {"x": (1, None)}}
    back = unpacked(json.loads(json.dumps(packed(call))))
    assert described(back) == described(call)
    with pytest.raises(TypeError, match="of type object cannot be handed to another process"):
        packed({"x": object()})
