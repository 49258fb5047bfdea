"""The model card of a quantized folder: what was quantized and how to open it. It says only what the folder itself holds.

It has no time and no path of this machine, so the same model gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelquant._markup import escaped
from reelquant._numbers import count, figure, size
from reelquant.checkpoint.folder import INDEX
from reelquant.models.blank import CLASS, QUANTIZATION, read_config, read_json
from reelquant.models.manifest import CARD, REPORT
from reelquant.models.origin import SOURCE, means_something_elsewhere

FIGURES = {"latent_psnr": ("PSNR of the final latents of held-out clips to float", "dB"), "latent_psnr_worst": ("the worst of them", "dB")}
"""Key of the report -> what the card calls a figure that calibration measured, and its unit."""


@dataclass(frozen=True)
class _Part:
    """A quantized component, by its folder.

    Attributes:
        name, kind: of the component and its class.
        config: its ``quantization_config``.
        bytes: of its weight files.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    bytes: int

    @property
    def row(self) -> list[str]:
        """Its line of the table."""
        numbers = Counter[str]()
        for group in self.config["config_groups"].values():
            numbers[f"{_tensor(group['weights'])}, inputs {_tensor(group['input_activations'])}"] += len(group["targets"])
        layers = [f"{escaped(words)}: {count(layers, 'layer')}" for words, layers in numbers.most_common()]
        kept = count(len(self.config["ignore"]), "layer")
        recipe = escaped((self.config.get("recipe") or {}).get("name") or "unnamed")
        digest = escaped(self.config.get("recipe_digest", ""))
        return [
            f"{escaped(self.name)} ({escaped(self.kind)})",
            f"{recipe} ({digest})",
            f"{'; '.join(layers)}; float: {kept}",
            size(self.bytes),
        ]


def write_card(folder: Path) -> None:
    """Write ``README.md`` beside ``model_index.json``, unless there is one or nothing is quantized."""
    if not (folder / CARD).exists() and (parts := list(_parts(folder))):
        (folder / CARD).write_text(_card(folder, parts), encoding="utf-8")


def _parts(folder: Path) -> Iterator[_Part]:
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        config = read_config(part)
        if QUANTIZATION in config:
            kind = config.get(CLASS) or ", ".join(config.get("architectures") or ["model"])
            yield _Part(part.name, kind, config[QUANTIZATION], sum(file.stat().st_size for file in part.glob("*.safetensors")))


def _card(folder: Path, parts: list[_Part]) -> str:
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    kind, source = str(read_json(folder / INDEX).get(CLASS)), str(report.get(SOURCE) or "")
    public = source if means_something_elsewhere(source) else ""
    recipes = ", ".join(dict.fromkeys((part.config.get("recipe") or {}).get("name") or "unnamed" for part in parts))
    lines = [
        *_front(public),
        f"# {escaped(public.rpartition('/')[2] or kind)}, quantized by {escaped(recipes)}",
        "",
        f"A {escaped(kind)} of diffusers{f', made from {escaped(public)}' if public else ''}, quantized after training with reelquant.",
        "",
        "| component | recipe | layers by weights and inputs | stored |",
        "|---|---|---|---|",
        *(f"| {' | '.join(part.row)} |" for part in parts),
        "",
        *_figures(report),
        "To open it, install reelquant and import it before diffusers opens the folder:",
        "",
        "```python",
        "import reelquant",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("this folder, or its id")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _front(public: str) -> list[str]:
    """What the hub reads; JSON is YAML, and quotes whatever a name holds."""
    base = [f"base_model: {json.dumps(public)}", "base_model_relation: quantized"] if "/" in public else []
    return ["---", "library_name: diffusers", *base, "tags:", "- reelquant", "- quantized", "---", ""]


def _figures(report: Mapping[str, Any]) -> list[str]:
    """What the report has measured; nothing where it has no figures."""
    before, after = (float(report.get(key) or 0) for key in ("bytes_float", "bytes_quantized"))
    smaller = [f"{size(before)} in float32, {size(after)} now: {before / after:.2f} times smaller"] if before and after else []
    bits = [f"{8 * after / (before / 4):.2f} bits for each of their parameters, scales and biases included"] if smaller else []
    named = {words: figure(report.get(key), unit) for key, (words, unit) in FIGURES.items() if report.get(key) is not None}
    named |= {name.replace("_", " "): figure(value) for name, value in (report.get("figures") or {}).items()}
    lines = [f"- quantized layers: {words}" for words in (*smaller, *bits)]
    lines += [f"- {escaped(name)}: {value}" for name, value in named.items()]
    return [*lines, ""] if lines else []


def _tensor(layout: Mapping[str, Any] | None) -> str:
    """How numbers are stored, in the words of recipes."""
    if layout is None:
        return "float"
    return f"{layout['format']} {layout['granularity']}{' dynamic' if layout.get('dynamic') else ''}"
