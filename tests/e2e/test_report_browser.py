"""The report in a real Chromium: nothing but the file is read, and all clips show the same frame."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reelquant.evidence.report import Panel, write
from reelquant.evidence.report.several import write as write_several
from tests.e2e.chromium import chromium
from tests.unit.evidence.report import HOSTILE, panels, sample, several, side_by_side

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


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_several(several(), side_by_side(frames=FRAMES), {}, tmp_path_factory.mktemp("recipes") / "report.html")


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    with opened(browser, report) as made:
        yield made


@pytest.fixture
def recipe_page(browser: Any, recipes: Path) -> Iterator[Any]:
    with opened(browser, recipes) as made:
        yield made


@contextmanager
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """The report with every clip loaded; complaints and requests of the page fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 2400})
    made = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    made.on("console", lambda message: said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.goto(report.as_uri())
    wait(made, "[...document.querySelectorAll('article.clip')].every(x => x.dataset.frame === '0')")
    yield made
    context.close()
    outside = [url for url in asked if url != report.as_uri() and not url.startswith(("data:", "blob:"))]
    assert (said, outside) == ([], [])


def shown(page: Any) -> list[list[int]]:
    """Per clip the frame number that its float and its quantized picture show, read from the drawn grey: 0.1 is frame 0."""
    return [[round(picture[0] / 25.5 - 1) for picture in row[:2]] for row in colours(page)]


READ = """canvas => {
    const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    copy.drawImage(canvas, canvas.width / 2, canvas.height / 2, 1, 1, 0, 0, 1, 1);
    return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


def colours(page: Any) -> list[list[list[int]]]:
    """Per clip and picture the colour drawn in the middle, read from a copy (reading the page's own canvas makes the browser complain)."""
    return page.evaluate(f"[...document.querySelectorAll('article.clip')].map(card => [...card.querySelectorAll('canvas')].map({READ}))")


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
    wait(page, "[...document.querySelectorAll('article.clip')].every(x => x.dataset.frame === document.getElementById('scrub').value)")
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


def test_clips_can_be_put_in_another_order_and_the_heading_says_which(recipe_page: Any) -> None:
    def heading() -> str:
        return recipe_page.locator("#clips h2").inner_text()

    assert heading() == "Clips, worst PSNR of any test first"
    recipe_page.locator("#order").select_option("psnr w4a8")
    assert heading() == "Clips, worst PSNR of w4a8 first"
    assert recipe_page.evaluate("[...document.querySelectorAll('article.clip')].map(x => x.dataset.name)") == ["0002", "0001", "0000"]


def test_headings_of_tables_follow_their_sorting(page: Any, recipe_page: Any) -> None:
    assert page.locator("#layers-sorted").inner_text() == ", in the order of the network"
    page.locator("#layers th button", has_text="Error").click()
    assert page.locator("#layers-sorted").inner_text() == ", by Error, largest first"
    page.locator("#layers th button", has_text="Layer").click()
    assert page.locator("#layers-sorted").inner_text() == ", by Layer, A to Z"
    recipe_page.locator("#tests th button", has_text="weights").click()
    recipe_page.locator("#tests th button", has_text="weights").click()
    assert recipe_page.locator("#recipes h2").inner_text() == "Recipes, by weights, smallest first"
    assert [row.split()[1] for row in recipe_page.locator("#tests tbody th").all_inner_texts()] == ["w4a4", "w4a8", "w8a8"]


def test_a_dot_leads_to_the_card_of_its_clip_by_mouse_and_by_keyboard(page: Any) -> None:
    def place() -> list[Any]:
        return page.evaluate("[document.activeElement.dataset.name, document.querySelectorAll('.clip.visited').length]")

    page.locator("circle[data-clip='0001']").first.click()
    assert place() == ["0001", 1]
    wait(page, "(box => box.top >= 0 && box.bottom <= innerHeight)(document.activeElement.getBoundingClientRect())", 10)  # it glides
    page.locator("circle[data-clip][tabindex='0']").first.focus()  # the lowest PSNR
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert place() == ["0000", 1]


def test_a_clip_that_the_page_does_not_show_has_a_pale_dot(browser: Any, tmp_path: Path) -> None:
    path = write(sample(frames=FRAMES), panels(2, FRAMES), tmp_path / "report.html")
    with opened(browser, path) as made:
        assert made.locator("circle.pale").get_attribute("data-clip") == "0002"
        assert "not among the clips of this page" in made.locator("circle.pale title").text_content()


def test_the_noise_floor_is_shown_on_request(page: Any) -> None:
    third = page.locator(".view.floor").first
    assert not third.is_visible()
    page.locator("#floor").check()
    assert third.is_visible()
    read = colours(page)[0]  # clip 0002: float, quantized 0.02 brighter, difference, floor 0.005 brighter
    assert read[0][0] <= read[3][0] < read[1][0]


def test_blind_votes_are_counted_for_what_was_hidden(page: Any) -> None:
    page.locator("#blind-open").click()
    assert page.evaluate("document.querySelector('#blind-vote').innerText").find("quantized") < 0
    said = []
    for key in ("1", "2", "0"):
        wait(page, "document.querySelector('#blind-where').textContent.startsWith('Clip ')")
        said.append(page.locator("#blind-where").inner_text())
        page.keyboard.press(key)
    assert said == ["Clip 1 of 3", "Clip 2 of 3", "Clip 3 of 3"]
    rows = [row.split("\t") for row in page.locator("#blind-rows tr").all_inner_texts()]
    assert sorted(row[0] for row in rows) == ["0000", "0001", "0002"]
    assert [row[3] for row in rows] == [rows[0][1], rows[1][2], "no difference"]
    votes = [row[3] for row in rows]
    tally = page.locator("#blind-tally").inner_text()
    assert f"float better: {votes.count('float')}, quantized better: {votes.count('quantized')}, no difference: 1 (3 of 3 clips)" in tally
    assert f"in {50 if votes[0] == votes[1] else 100} of 100 cases" in tally  # of two choices
    page.locator("#blind-start").click()
    page.locator("#blind-reveal").click()
    assert "(0 of 3 clips)" in page.locator("#blind-tally").inner_text()
    page.keyboard.press("Escape")
    page.locator("#clips > #transport").wait_for(state="visible")


def test_blind_sides_show_what_the_reveal_says(recipe_page: Any) -> None:
    """The darker of float and the last test is float; sides are drawn anew for every clip."""
    recipe_page.locator("#blind-open").click()
    recipe_page.locator("#blind-second").select_option(label="w4a4")
    if recipe_page.locator("#play").get_attribute("aria-pressed") == "true":
        recipe_page.locator("#play").click()
    seen = []
    for _ in range(3):
        recipe_page.locator("#scrub").fill("0")
        recipe_page.wait_for_timeout(300)
        grey = [recipe_page.evaluate(f"({READ})(document.getElementById('blind-{side}'))")[0] for side in "ab"]
        seen.append("float" if grey[0] < grey[1] else "w4a4")
        recipe_page.keyboard.press("1")
    rows = [row.split("\t") for row in recipe_page.locator("#blind-rows tr").all_inner_texts()]
    assert [row[1] for row in rows] == seen and [row[3] for row in rows] == seen


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
@pytest.mark.parametrize("which", ["report", "recipes"])
def test_no_sideways_scrolling_on_a_phone(browser: Any, request: pytest.FixtureRequest, which: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    phone = context.new_page()
    phone.goto(request.getfixturevalue(which).as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_heads_of_long_tables_stay_in_sight(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 300})
    page.locator(".metrics tbody tr").last.scroll_into_view_if_needed()
    assert -1 <= page.evaluate("document.querySelector('.metrics thead th').getBoundingClientRect().top") < 60


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
