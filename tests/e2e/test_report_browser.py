"""The report in a real Chromium: nothing but the file is read, and all clips show the same frame."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reelquant.evidence.report import Panel, write
from tests.e2e.chromium import chromium
from tests.unit.evidence.report import HOSTILE, panels, sample

FRAMES = 8


def wait(page: Any, condition: str, seconds: float = 60) -> None:
    """Until a condition holds. (playwright's own wait evaluates strings in the page, which the page forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"still not true after {seconds} s: {condition}"
        page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(sample(frames=FRAMES), panels(frames=FRAMES), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report with every clip loaded; complaints and requests of the page fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 2400})
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    wait(opened, "[...document.querySelectorAll('article.clip')].every(x => x.dataset.frame === '0')")
    yield opened
    context.close()
    outside = [url for url in asked if url != report.as_uri() and not url.startswith(("data:", "blob:"))]
    assert (said, outside) == ([], [])


def shown(page: Any) -> list[list[int]]:
    """Per clip the frame number that its float and its quantized picture show, read from the drawn grey: 0.1 is frame 0."""
    return [[round(picture[0] / 25.5 - 1) for picture in row[:2]] for row in colours(page)]


def colours(page: Any) -> list[list[list[int]]]:
    """Per clip and picture the colour drawn in the middle, read from a copy (reading the page's own canvas makes the browser complain)."""
    read = """canvas => {
        const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        copy.drawImage(canvas, canvas.width / 2, canvas.height / 2, 1, 1, 0, 0, 1, 1);
        return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }"""
    return page.evaluate(f"[...document.querySelectorAll('article.clip')].map(card => [...card.querySelectorAll('canvas')].map({read}))")


def all_at(page: Any, frame: int) -> bool:
    wait(page, f"[...document.querySelectorAll('article.clip')].every(x => x.dataset.frame === '{frame}')")
    return shown(page) == [[frame, frame]] * 3


def test_scrubber_moves_all_clips_to_the_same_frame(page: Any) -> None:
    assert all_at(page, 0)
    for frame in (5, 1, FRAMES - 1, 2):
        page.locator("#scrub").fill(str(frame))
        assert all_at(page, frame), frame
    assert page.locator("#where").inner_text() == f"3 / {FRAMES}"
    assert float(page.locator(".cursor").first.get_attribute("x1")) == pytest.approx(100 * 2 / (FRAMES - 1))


def test_keys_step_and_wrap_around(page: Any) -> None:
    page.keyboard.press("ArrowRight")
    assert all_at(page, 1)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert all_at(page, FRAMES - 1)


def test_play_advances_all_clips_and_pause_leaves_them_together(page: Any) -> None:
    page.locator("#play").click()
    wait(page, "[...document.querySelectorAll('article.clip')].every(x => Number(x.dataset.frame) >= 2)")
    page.keyboard.press("ArrowRight")  # a step pauses
    assert page.locator("#play").get_attribute("aria-pressed") == "false"
    assert all_at(page, int(page.locator("#scrub").input_value()))


def test_a_clip_can_be_enlarged_and_wiped(page: Any) -> None:
    page.locator("article.clip canvas").first.click()
    assert page.locator("dialog#large").is_visible() and page.locator("dialog #transport").is_visible()
    page.locator("#wipe").fill("250")
    page.keyboard.press("ArrowLeft")
    page.locator("[data-mode=side]").click()
    assert page.evaluate("document.getElementById('stage').width") == 2 * 192 + 8
    page.keyboard.press("Escape")
    page.locator("#clips > #transport").wait_for(state="visible")  # it comes back when the dialog has closed
    assert not page.locator("dialog#large").is_visible()


def test_prompts_are_shown_as_text(page: Any) -> None:
    assert page.locator("article.clip h3").all_inner_texts() == ["a blue star", HOSTILE, "a red circle"]


def test_layers_sort_and_filter(page: Any) -> None:
    def names() -> list[str]:
        return page.locator("#layers tbody tr:visible td:first-child").all_inner_texts()

    page.locator("#layers th button", has_text="Error").click()
    assert names() == ["blocks.2.a", "blocks.10.a", "time"]
    page.locator("#layers th button", has_text="Error").click()
    assert names() == ["blocks.10.a", "blocks.2.a", "time"]  # nothing known stays last
    page.locator("#layers th button", has_text="Layer").click()
    assert names() == ["blocks.2.a", "blocks.10.a", "time"]  # 2 before 10
    page.locator("#filter").fill("temporal")
    assert names() == ["time"] and page.locator("#matches").inner_text() == "1 of 3"


def test_clips_can_be_put_in_another_order(page: Any) -> None:
    page.locator("#order").select_option("psnr")
    assert page.evaluate("[...document.querySelectorAll('article.clip')].map(x => x.dataset.name)") == ["0002", "0001", "0000"]


def test_colours_arrive_as_they_were_sampled(browser: Any, tmp_path: Path) -> None:
    colour = torch.tensor([0.9, 0.12, 0.2])
    clip = colour.view(1, 3, 1, 1).expand(2, 3, 64, 64)
    path = write({}, [Panel("0", "", 0, {}, clip, clip.flip(1))], tmp_path / "report.html")
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(path.as_uri())
    wait(opened, "document.querySelector('article.clip').dataset.frame === '0'")
    for picture, expected in zip(colours(opened)[0], [colour, colour.flip(0)], strict=False):
        assert (torch.tensor(picture) - 255 * expected).abs().max() <= 4, "the wrong matrix or range is off by 10 and more"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_sideways_scrolling_on_a_phone(browser: Any, report: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(report.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_without_h264_a_sentence_and_still_pictures_stand_there(browser: Any, report: Path) -> None:
    context = browser.new_context()
    opened = context.new_page()
    opened.add_init_script("HTMLMediaElement.prototype.canPlayType = () => ''")
    opened.goto(report.as_uri())
    assert opened.locator("#codec").is_visible()
    middle = 0.1 * (FRAMES // 2 + 1) * 255
    read = "document.querySelector('article.clip canvas').getContext('2d').getImageData(9, 9, 1, 1).data[0]"
    wait(opened, f"Math.abs({read} - {middle}) < 6")
    context.close()
