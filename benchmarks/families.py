"""Every peer on every family: how many layers it quantizes, what they weigh, how far the output is from float, or how it dies.

Run it from the repository root, in an environment that holds the peers (``benchmarks/README.md``)::

    python -m benchmarks.families --output benchmarks/results

The models are those of ``tests/families``: tiny, random, with the wiring and the call of the real ones. Errors of random models say that
the right function is computed, not how good a video is; which layers are quantized, and failures, carry over. Every peer starts from the
same float32 model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import reelquant
from benchmarks.common import layer_sizes, markdown, quantized_layers, weight_bytes, write_csv
from benchmarks.peers import torchao_int8, torchao_int8_dynamic
from tests.families.checks import Case, output, snr
from tests.families.models import FAMILIES


@dataclass(frozen=True)
class Peer:
    """A column of the table.

    Attributes:
        bits: of weights and activations.
        apply: a float model -> a quantized one (or the same, changed).
        package: what must be installed.
    """

    bits: str
    apply: Callable[[Case, Any], Any]
    package: str = "reelquant"


def own(recipe: str) -> Callable[[Case, Any], Any]:
    """This library, while loading."""
    return lambda case, model: case.quantized(recipe)


def sdnq(**options: Any) -> Callable[[Case, Any], Any]:
    """SDNQ with its defaults, but for the smallest size of a layer: these models are all small."""

    def apply(case: Case, model: Any) -> Any:
        from sdnq import sdnq_post_load_quant

        sdnq_post_load_quant(model, minimum_allowed_numel=0, minimum_allowed_channel_size=0, **options)
        return model

    return apply


def torchao(config: Callable[[], Any]) -> Callable[[Case, Any], Any]:
    """torchao on all linear layers, its default."""

    def apply(case: Case, model: Any) -> Any:
        from torchao.quantization import quantize_

        quantize_(model, config())
        return model

    return apply


def quanto(case: Case, model: Any) -> Any:
    """optimum-quanto with its defaults."""
    from optimum.quanto import freeze, quantize

    quantize(model, weights="qint8")
    freeze(model)
    return model


def orbitquant(case: Case, model: Any) -> Any:
    """OrbitQuant with the policy it has for the class, through a pipeline that holds nothing else."""
    from orbitquant import OrbitQuantConfig, quantize_pipeline

    name = "unet" if "UNet" in case.cls.__name__ else "transformer"
    pipe = SimpleNamespace(**{name: model}, components={name: model})
    quantize_pipeline(pipe, OrbitQuantConfig(weight_bits=8, activation_bits=8, codebook_version=1), component=name)
    return getattr(pipe, name)


PEERS = {
    "reelquant w8a16": Peer("8/16", own("w8a16")),
    "SDNQ int8": Peer("8/16", sdnq(), "sdnq"),
    "SDNQ int8, convolutions": Peer("8/16", sdnq(quant_conv=True), "sdnq"),
    "torchao int8": Peer("8/16", torchao(torchao_int8), "torchao"),
    "torchao int8 dynamic": Peer("8/8", torchao(torchao_int8_dynamic), "torchao"),
    "optimum-quanto int8": Peer("8/16", quanto, "optimum-quanto"),
    "OrbitQuant W8A8": Peer("8/8", orbitquant, "orbitquant"),
}


def measure(case: Case, name: str) -> dict[str, Any]:
    """One cell: figures, or the error it ends with."""
    peer, model = PEERS[name], case.float()
    sizes, before = layer_sizes(model), weight_bytes(model)
    row: dict[str, Any] = {"family": case.family.title, "peer": name, "bits": peer.bits, "version": _version(peer.package)}
    if row["version"] is None:
        return row | {"status": "not installed"}
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            model = peer.apply(case, model)
        found = quantized_layers(model, sizes)
        error = snr(case.reference, output(model, case.inputs()))
    except Exception as failure:  # a row of the table
        return row | {"status": "failed", "reason": re.sub(r"\s+", " ", f"{type(failure).__name__}: {failure}")[:200]}
    figures = {"layers": len(sizes), "quantized": len(found), "share": sum(sizes[n] for n in found) / sum(sizes.values())}
    status = "measured" if found else "failed"
    reason = {} if found else {"reason": "no layer was quantized, and nothing was said"}
    return row | {"status": status, **reason, **figures, "bytes_float32": before, "bytes": weight_bytes(model), "snr_db": error}


def _version(package: str) -> str | None:
    try:
        return reelquant.__version__ if package == "reelquant" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cell(row: dict[str, Any]) -> str:
    """Layers quantized of all, share of the weights, bytes against float32, error."""
    if row["status"] != "measured":
        return row["status"]
    error = "nan" if math.isnan(row["snr_db"]) else "exact" if math.isinf(row["snr_db"]) else f"{row['snr_db']:.0f} dB"
    return f"{row['quantized']}/{row['layers']}, {row['share']:.0%}, {row['bytes'] / row['bytes_float32']:.2f}, {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="families")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(name, Path(folder))
            rows += [measure(case, peer) for peer in PEERS]
        print(name, *(cell(row) for row in rows[-len(PEERS) :]), sep="\n  ", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "families.csv", rows)
    (options.output / "families.md").write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    """The table, and what the failures said."""
    titles = list(dict.fromkeys(row["family"] for row in rows))
    table = [[title, *(cell(row) for row in rows if row["family"] == title)] for title in titles]
    versions = {row["peer"]: f"{row['peer']} {row['version']} ({row['bits']})" for row in rows}
    said = [f"* {row['family']}, {row['peer']}: {row['reason']}" for row in rows if row.get("reason")]
    return "\n".join([
        "# Peers, family by family", "",
        "`python -m benchmarks.families`. A cell: layers quantized of all linear and convolution layers, their share of the weights, bytes",
        "of the whole model against float32, and signal over noise of the output against float32 on a fixed input. Tiny random models:",
        "which layers a peer quantizes and how it fails carries over to real ones; shares and bytes depend on the widths, which are not",
        "those of the real ones; an error in dB shows only that the right function is computed, and a peer that quantizes less is nearer",
        "to float. Every peer has its defaults, but for SDNQ's lower limit on sizes, which would skip every layer.", "",
        markdown(["family", *versions.values()], table), "", "What the failures said:", "", *(said or ["none"]), "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
