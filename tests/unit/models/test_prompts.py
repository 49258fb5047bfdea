"""Prompt files of every kind, broken ones, and the bundled set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelquant import CalibrationError
from reelquant.models.condition import Condition
from reelquant.models.prompts import STRESSES, bundled_prompts, load_conditions, read_prompts


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_plain_text_skips_blank_lines_and_comments(tmp_path: Path):
    file = written(tmp_path, "p.txt", "# two of them\n\n a dog \r\na cat on [the] roof\n")
    assert read_prompts(file) == ["a dog", "a cat on [the] roof"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path):
    assert read_prompts(written(tmp_path, "p.txt", b"\xef\xbb\xbfa dog\n")) == ["a dog"]


def test_a_text_that_starts_with_a_bracket_is_a_prompt(tmp_path: Path):
    assert read_prompts(written(tmp_path, "p.txt", "[slow pan] a lake\n{braces} too\n")) == ["[slow pan] a lake", "{braces} too"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p"])
def test_json_lines_are_known_by_ending_or_content(tmp_path: Path, name: str):
    lines = ['{"prompt": "a dog", "seed": 3, "name": "d", "dimension": "motion"}', "", '{"prompt_en": "a cat", "dimension": ["x", "y"]}']
    assert load_conditions(written(tmp_path, name, "\n".join(lines))) == [
        Condition("a dog", 3, "d", ("motion",)),
        Condition("a cat", None, None, ("x", "y")),
    ]


@pytest.mark.parametrize("name", ["p.json", "p.txt"])
def test_a_json_list_may_hold_texts_and_objects(tmp_path: Path, name: str):
    content = json.dumps([{"prompt_en": "a toilet, frozen in time", "dimension": ["temporal_flickering"], "auxiliary_info": {}}, "a dog"])
    assert load_conditions(written(tmp_path, name, content)) == [
        Condition("a toilet, frozen in time", dimensions=("temporal_flickering",)),
        Condition("a dog"),
    ]


def test_tab_separated_prompts_keep_their_quotes_and_category(tmp_path: Path):
    file = written(tmp_path, "p.tsv", 'Prompt\tCategory\tChallenge\tNote\na sign saying "yes"\tText\tBasic\t\nbond\tAbstract\tBasic\tx\n')
    assert load_conditions(file) == [Condition('a sign saying "yes"', dimensions=("Text",)), Condition("bond", dimensions=("Abstract",))]


BROKEN: dict[str, tuple[str, str | bytes, str]] = {
    "json line": ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: broken JSON"),
    "json list": ("p.json", '[\n{"prompt": "a"},\n{]', r"p\.json:3: broken JSON at column 2"),
    "json of one object": ("p.json", '{"prompt": "a"}', "a JSON dict where a list"),
    "number": ("p.jsonl", '"a"\n7\n', r"p\.jsonl:2: 7 is not a prompt"),
    "other keys": ("p.jsonl", '{"promt": "a"}', r"p\.jsonl:1: no text under prompt.*keys: promt"),
    "empty text": ("p.json", '["a", " "]', "entry 2: no text"),
    "seed": ("p.jsonl", '{"prompt": "a", "seed": -1}', r"p\.jsonl:1: seed -1"),
    "column": (
        "p.tsv",
        "Text_\tCategory\na\tb\n",
        r"p\.tsv:1: no column prompt, .*; the columns are Text_, Category",
    ),
    "empty cell": ("p.tsv", "Prompt\tCategory\na\tb\n\tb\n", r"p\.tsv:3: no text"),
    "nothing": ("p.txt", "", "holds no prompt"),
    "comments only": ("p.txt", "# a\n\n", "holds no prompt"),
    "no lines": ("p.jsonl", "\n", "holds no prompt"),
    "empty json": ("p.json", "", "holds no prompt"),
    "header only": ("p.tsv", "Prompt\tCategory\n", "holds no prompt"),
    "latin-1": ("p.txt", b"a dog\na caf\xe9\n", r"p\.txt:2: byte 0xe9 is not UTF-8"),
    "utf-16": ("p.txt", "a dog\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "binary": ("p.txt", b"\x7fELF\n\0\0", r"p\.txt:2: a zero byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, case: str):
    name, content, message = BROKEN[case]
    with pytest.raises(CalibrationError, match=message):
        load_conditions(written(tmp_path, name, content))


@pytest.mark.parametrize("name", ["p.csv", "p.yaml", "p.yml"])
def test_commas_stay_in_columns_and_lists(tmp_path: Path, name: str):
    table = 'id,Prompt,seed\n1,"a red circle, moving left",3\n2,"two\nlines",\n'
    listed = '- {prompt: "a red circle, moving left", seed: 3}\n- "two\\nlines"\n'
    found = load_conditions(written(tmp_path, name, table if name.endswith("csv") else listed))
    assert found == [Condition("a red circle, moving left", 3), Condition("two\nlines")]


def test_only_line_feeds_end_a_prompt(tmp_path: Path):
    assert read_prompts(written(tmp_path, "p.txt", "a dog\u2028on a roof\n")) == ["a dog\u2028on a roof"]


NOT_PROMPTS = {
    "ending": ("p.docx", "a dog", "ends in .docx"),
    "cells": ("p.csv", "prompt\na red circle, moving left\n", "p.csv:2: more cells than the header has"),
    "quote": ("p.csv", 'prompt\n"a dog" runs\n', "p.csv:2: .*double quotes"),
    "columns": ("p.csv", "a red circle\na blue star\n", "p.csv:1: no column prompt"),
    "mapping": ("p.yaml", "prompt: a dog\n", "a YAML dict where a list"),
    "broken": ("p.yaml", "- [a\n- b\n", "p.yaml:3: broken YAML"),
    "alias": ("p.yaml", "- &a {prompt: dog}\n- *a\n", "p.yaml:2: broken YAML: an alias"),
    "date": ("p.yaml", "- 2020-99-99\n", "broken YAML"),
}


@pytest.mark.parametrize("case", NOT_PROMPTS)
def test_what_cannot_be_read_as_prompts_is_refused(tmp_path: Path, case: str):
    name, content, message = NOT_PROMPTS[case]
    with pytest.raises(CalibrationError, match=message):
        load_conditions(written(tmp_path, name, content))


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path):
    with pytest.raises(CalibrationError, match="does not exist"):
        read_prompts(tmp_path / "no.txt")
    with pytest.raises(CalibrationError, match="holds no picture or clip"):
        read_prompts(tmp_path)


def test_the_bundled_prompts_are_96_different_ones_and_the_first_six_one_of_each_stress():
    everything = bundled_prompts()
    assert len(everything) == len(set(everything)) == 96
    assert [next(s for s in STRESSES if text in bundled_prompts(s)) for text in everything[:6]] == list(STRESSES)
    for stress in STRESSES:
        assert len(bundled_prompts(stress)) == 16
    assert all(40 < len(text) < 140 for text in everything)


def test_an_unknown_stress_is_told_the_nearest():
    with pytest.raises(CalibrationError, match="did you mean 'motion'"):
        bundled_prompts("motions")


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("VBench_all_dimension.txt", 946, Condition("In a still frame, a stop sign")),
        ("VBench_full_info.json", 946, Condition("In a still frame, a stop sign", dimensions=("temporal_flickering",))),
        ("VBench2_full_text.txt", 1013, Condition("A wooden toy is placed gently on the surface of a small bowl of water.")),
        ("PartiPrompts.tsv", 1632, Condition("bond", dimensions=("Abstract",))),
    ],
)
def test_published_lists_are_read_whole(material: Path, name: str, count: int, first: Condition):
    prompts = load_conditions(material / "prompts" / name)
    assert len(prompts) == count and prompts[0] == first
