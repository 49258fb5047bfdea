"""Evaluate several recipes on the same clips, and take the best one that fits a size.

python examples/choose_recipe.py --megabytes 5
python examples/choose_recipe.py --pipeline path/to/pipeline --recipes qvd-w8a8 reel-w4a8 reel-w4a4 --clips 16 --steps 50 --megabytes 9000
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import reelquant


def main() -> None:
    """Print a row for each recipe, and the choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tiny-dit", help="bundled name, folder or hub id")
    parser.add_argument("--recipes", nargs="+", default=["quarot-w8a8", "w8a16", "w4a16"], help="names from `reelquant recipes`")
    parser.add_argument("--megabytes", type=float, default=5.0, help="the quantized layers may take so much")
    parser.add_argument("--clips", type=int, default=2, help="clips of an evaluation; 16 tell recipes apart that are 3 dB apart")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a clip")
    wanted = parser.parse_args()

    rows, first = {}, None
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in wanted.recipes:
            pipe = reelquant.open_pipeline(wanted.pipeline)
            report = reelquant.quantize(pipe, recipe, progress=False)
            folder = reelquant.save(pipe, Path(scratch) / recipe, report)
            made = reelquant.evaluate(
                folder,
                wanted.pipeline,
                clips=wanted.clips,
                metrics="psnr",
                floor=["none"],
                output=Path(scratch) / f"{recipe}-clips",
                reuse=first,  # float clips are made once
                num_inference_steps=wanted.steps,
                progress=False,
            )
            first = first or Path(scratch) / f"{recipe}-clips"
            rows[recipe] = (report.bytes_quantized / 1e6, made["psnr"])
            print(f"{recipe:15} {rows[recipe][0]:6.2f} MB  {rows[recipe][1]:5.1f} dB")

    fitting = {recipe: quality for recipe, (size, quality) in rows.items() if size <= wanted.megabytes}
    if not fitting:
        raise SystemExit(f"none fits into {wanted.megabytes} MB; the smallest takes {min(size for size, _ in rows.values()):.2f} MB")
    print(f"take {max(fitting, key=fitting.__getitem__)}: the best that fits into {wanted.megabytes} MB")


if __name__ == "__main__":
    main()
