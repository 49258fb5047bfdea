"""Several quantized pipelines against one float pipeline: an evaluation each, float clips that are sampled once, and one page.

OUT/NAME/          the evaluation of a test, as `evaluate` writes it for one
OUT/several.json   which tests: a run that is resumed continues them
OUT/report.json, report.html, summary.md
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reelquant._errors import CheckpointError, RecipeError, UnsupportedError, printable
from reelquant._markup import table
from reelquant._numbers import count
from reelquant._progress import tell
from reelquant._version import __version__
from reelquant.evidence.causes import refuse_pair
from reelquant.evidence.clips import Clip
from reelquant.evidence.evaluation import PAIRED_FLOORS, SCHEMA, Evaluation
from reelquant.evidence.judging import Options, worst
from reelquant.evidence.metrics import METRICS
from reelquant.evidence.report.panels import BADNESS
from reelquant.evidence.run import check_described, evaluate
from reelquant.evidence.store import RUN, Store, read_state, write_json, write_text

LIST = "several.json"
SHARED = ("command", "reference", "prompts", "seeds", "call", "clips", "floors", "machine", "versions")  # of the first test's report
OWN = (  # of each test's report
    *("test", "clips", "floors", "metrics", "gate", "near_lossless", "defects", "warnings"),
    *("bytes", "speed", "saturation", "reuse", "seconds"),
)
NOT_ON_THE_PAGE = ("layers", "trials", "skipped", "kept")  # of the report of quantizing; every test has a page of its own


@dataclass(repr=False)
class Evaluations:
    """Results of several tests.

    Attributes:
        tests: evaluation by name of the test, in the order they were given.
        data: the content of ``report.json`` (schema: docs/report.md).
        folder: where everything lies; None if nothing was kept.
    """

    tests: dict[str, Evaluation]
    data: dict[str, Any]
    folder: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every test passes the gate; True if there is none."""
        return all(made.passed for made in self.tests.values())

    def __getitem__(self, name: str) -> Evaluation:
        """The evaluation of a test."""
        return self.tests[name]

    def __repr__(self) -> str:
        return printable(f"Evaluations({', '.join(map(repr, self.tests.values()))})")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from reelquant.evidence.report.several_table import HEADS, summary_rows

        reference, clips = self.data["reference"].get("name"), count(self.data.get("clips") or 0, "clip")
        kept = [f"Report: {self.folder / 'report.html'}"] if self.folder is not None else []
        return table(f"{len(self.tests)} tests against {reference}, {clips}", summary_rows(self.data), HEADS, kept)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return self.data

    def summary(self) -> str:
        """A Markdown summary to paste into a pull request."""
        from reelquant.evidence.report.several_table import markdown

        return markdown(self.data)


def evaluate_several(
    tests: Sequence[Any],
    reference: Any,
    prompts: Any = None,
    *,
    options: Options | None = None,
    files: str | None = None,
    **how: Any,
) -> Evaluations:
    """Evaluate each test against the float pipeline, whose clips the first one makes and the others take over.

    Args:
        tests: quantized pipelines.
        reference, prompts, options, files, how: as for :func:`reelquant.evidence.run.evaluate`.

    Raises:
        RecipeError: for fewer than two tests, or the same one twice.
        CheckpointError: if the output holds something else.
        UnsupportedError: where processes share the clips.
    """
    options = options or Options()
    if options.shared:
        raise UnsupportedError("several tests are not shared by processes; evaluate each of them so, or all in one process")
    names = names_of(tests)
    for test in tests:  # all of them before the first is sampled
        check_described(test)
        refuse_pair(reference, test, files)
    with _root(options, names) as root:
        made: dict[str, Evaluation] = {}
        for number, (name, test) in enumerate(zip(names, tests, strict=True)):
            tell(options.progress, f"{name}, {number + 1} of {len(names)}")
            own = replace(
                options, output=root / name, reuse=root / names[0] if number else options.reuse, tests_after=len(names) - 1 - number
            )
            one = evaluate(test, reference, prompts, options=own, files=files, checked=True, **how)
            assert one is not None  # no other process has it
            made[name] = one
        data = _data(made)
        found = Evaluations(made, data, None if options.output is None else root)
        if found.folder is not None:
            options.progress.phase("write", 1)
            _write(found, options.shown)
        else:
            for evaluation in made.values():
                evaluation.folder = None
    return found


def names_of(tests: Sequence[Any]) -> list[str]:
    """A name for every test: that of its folder, with the folder above where two are called alike, or the class of a pipeline.

    Raises:
        RecipeError: for fewer than two tests, or the same one twice.
    """
    if len(tests) < 2:
        raise RecipeError(f"give at least two quantized pipelines, got {len(tests)}; `evaluate` takes one")
    places = [Path(test).resolve() if isinstance(test, str | Path) else None for test in tests]
    twice = next((str(test) for i, test in enumerate(tests) if places[i] is not None and places[i] in places[:i]), None)
    if twice is not None:
        raise RecipeError(f"'{twice}' is given twice; every test is another pipeline")
    short = [type(test).__name__ if place is None else place.name for test, place in zip(tests, places, strict=True)]
    longer = [
        name if short.count(name) == 1 or place is None else f"{place.parent.name}-{name}"
        for name, place in zip(short, places, strict=True)
    ]
    return [name if longer.count(name) == 1 else f"{name}-{longer[:i].count(name) + 1}" for i, name in enumerate(longer)]


@contextmanager
def _root(options: Options, names: Sequence[str]) -> Iterator[Path]:
    """The folder that was asked for, or one that is deleted when the work is done."""
    if options.output is None:
        with tempfile.TemporaryDirectory(prefix="reelquant-") as folder:
            yield Path(folder)
        return
    root, file = options.output, options.output / LIST
    if file.is_file():
        if not (options.resume or options.force):
            raise CheckpointError(f"'{root}' already holds evaluations; pass --resume to continue them or --force to replace them")
        left = [name for name in read_state(file).get("tests", []) if isinstance(name, str) and name not in names]
        for name in left if options.force else ():
            if (root / name / RUN).is_file():
                shutil.rmtree(root / name)
    elif root.is_dir() and any(root.iterdir()):
        raise CheckpointError(f"'{root}' is not empty and holds no evaluations of several tests; choose another --output")
    write_json(file, {"tests": list(names)})
    yield root


# --- report.json ------------------------------------------------------------------------------------------------------


def _data(made: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The content of ``report.json``."""
    first = next(iter(made.values())).data
    quality = _quality(made)
    return {
        "schema": SCHEMA,
        "kind": "several",
        "tool_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: first.get(key) for key in SHARED},
        "quality": quality,
        "tests": [_test(name, one.data, quality) for name, one in made.items()],
    }


def _quality(made: Mapping[str, Evaluation]) -> str | None:
    """The first metric with a better direction that every test has: what sorts tests and clips."""
    return next(
        (name for name in METRICS if METRICS[name].better in BADNESS and all(_measured(one, name) for one in made.values())),
        None,
    )


def _measured(made: Evaluation, name: str) -> bool:
    return name in made.metrics and made.metrics[name].interval is not None


def _test(name: str, data: Mapping[str, Any], quality: str | None) -> dict[str, Any]:
    """What is kept of a test's report, and its figures for the table of all tests."""
    quantization = data.get("quantization")
    reduced = quantization and {key: value for key, value in quantization.items() if key not in NOT_ON_THE_PAGE}
    rows = [row for row in data["per_clip"] if quality in row["figures"]]
    last = max(rows, key=lambda row: BADNESS[METRICS[quality].better](row["figures"][quality]), default=None) if quality else None
    return {
        "name": name,
        "folder": name,
        **{key: data.get(key) for key in OWN},
        "quantization": reduced,
        "worst_clip": last and {"name": last["name"], "value": last["figures"][quality]},
        "per_clip": [{key: row[key] for key in ("name", "prompt", "seed", "figures")} for row in data["per_clip"]],
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def _write(made: Evaluations, shown: int) -> None:
    from reelquant.evidence.report.several import write

    assert made.folder is not None
    write_json(made.folder / "report.json", made.data)
    write_text(made.folder / "summary.md", made.summary())
    curves = {name: {row["name"]: row["curves"] for row in one.data["per_clip"]} for name, one in made.tests.items()}
    write(made.data, _panels(made, shown), curves, made.folder / "report.html")


def _panels(made: Evaluations, shown: int) -> list[Any]:
    """Clips side by side: those in which any test is worst come first."""
    from reelquant.evidence.report.panels import Panel

    assert made.folder is not None
    stores = {name: Store(made.folder / name) for name in made.tests}
    first = next(iter(stores.values()))
    floor = next((name for name in PAIRED_FLOORS if name in made.data["floors"]), None)
    rows = {name: {row["name"]: row for row in one.data["per_clip"]} for name, one in made.tests.items()}

    def read(store: Store, variant: str, clip: str) -> Any:
        return Clip(clip, (store.clip(variant, clip),)).read()

    lowest = [min(found.values(), key=lambda row: row["figures"].get("psnr", 0.0)) for found in zip_by_clip(rows)]
    panels = []
    for row in worst(lowest)[:shown]:
        clip = row["name"]
        tests = [read(store, "test", clip) for store in stores.values()]
        figures = {f"{metric} {name}": value for name in rows for metric, value in rows[name][clip]["figures"].items()}
        third = None if floor is None else read(first, floor, clip)
        panels.append(Panel(clip, row["prompt"] or "", row["seed"], figures, read(first, "reference", clip), tests[0], tests[1:], third))
    return panels


def zip_by_clip(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Mapping[str, Any]]]:
    """The rows of every test by clip, of the clips that all tests have."""
    tests = list(rows.values())
    return [{name: rows[name][clip] for name in rows} for clip in tests[0] if all(clip in one for one in tests)]
