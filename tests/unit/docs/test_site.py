"""The docs: pages that are written from the code, links out of docs/, and commands that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from reelquant.recipes.text import names
from website.generate import PAGES, verbs
from website.hooks import DOCS, ROOT, led, uri_of

TEXTS = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / DOCS).glob("*.md")])
SKETCHES = ("VERB", "...", "RECIPE", "NAME")  # words of commands that stand for others


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_those_of_the_code(name: str) -> None:
    assert (ROOT / DOCS / name).read_text() == PAGES[name](), "python -m website.generate writes the pages again"


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load("nav:" + text.partition("\nnav:")[2])["nav"]
    listed = {one if isinstance(one, str) else next(iter(one.values())) for section in nav for one in next(iter(section.values()))}
    pages = {file.name for file in (ROOT / DOCS).glob("*.md")}
    commented = set(re.findall(r"# - (\S+\.md)", text))  # written elsewhere
    assert pages - commented <= listed
    assert {page for page in listed if "/" not in page} <= pages | {"index.md"}


def test_links_lead_to_pages_of_the_site() -> None:
    assert led("[a](docs/results.md#is-it-fast) ![b](docs/pictures/clips.png)", "index.md") == (
        "[a](results.md#is-it-fast) ![b](pictures/clips.png)"
    )
    assert led("see [b](../benchmarks/README.md)", "kernels.md") == "see [b](repository/benchmarks/README.md)"
    outside = "repository/benchmarks/README.md"
    assert led("[t](../docs/trust.md) [r](results/reel.md)", outside) == "[t](../../trust.md) [r](results/reel.md)"
    assert led("[avx2](results/avx2), [csv](results/tiny-dit.csv)", outside) == "avx2, csv"
    for kept in ("[x](https://a.b/c.md)", "[x](#here)", "[x](gone.md)", "![x](gone.png)"):
        assert led(kept, "kernels.md") == kept
    assert uri_of("README.md") == "index.md" and uri_of("src/reelquant/__init__.py") is None


def commands(text: str) -> Iterator[str]:
    """Every command of a page: in blocks of code and in sentences. Words behind four blanks are explanations."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from re.findall(r"^(reelquant .*)$", block, re.MULTILINE)
    yield from re.findall(r"^    (reelquant .*)$", text, re.MULTILINE)
    yield from re.findall(r"`(reelquant [^`]+)`", text)


def problem(command: str) -> str | None:
    """What the command line would refuse in a command."""
    words = shlex.split(re.split(r"\s{4,}", command)[0], comments=True)[1:]
    while words[:1] and words[0].startswith("-"):
        words = words[2:] if words[0] == "--plugin" else words[1:]
    if not words or any(word.startswith(SKETCHES) for word in words):
        return None
    if words[0] not in verbs():
        return f"no verb {words[0]}"
    known = {part for one in verbs()[words[0]][1] for name in one.names for part in name.split("/")} | {"--help", "-h"}
    for word, value in pairwise([*words[1:], ""]):
        if word.startswith("-") and not word[1:2].isdigit() and word.partition("=")[0] not in known:
            return f"no option {word}"
        recipe = value.rpartition("=")[2]
        if word in ("-r", "--recipe") and recipe and not recipe.endswith(".yaml") and recipe not in names():
            return f"no recipe {recipe}"
    return None


@pytest.mark.parametrize("page", TEXTS, ids=lambda file: file.name)
def test_commands_of_the_docs_are_taken_by_the_command_line(page: Path) -> None:
    refused = {command: found for command in commands(page.read_text()) if (found := problem(command))}
    assert not refused


def test_a_command_that_would_be_refused_is_seen() -> None:
    assert problem("reelquant quantise tiny-dit") == "no verb quantise"
    assert problem("reelquant quantize tiny-dit -r qvd-w8a8 --outptu out") == "no option --outptu"
    assert problem("reelquant quantize tiny-dit -r transformer=qvd-w9a9 -o out") == "no recipe qvd-w9a9"
    assert problem("reelquant --plugin a.py quantize tiny-dit -r qvd-w8a8 -o out    # words --here") is None
