"""The page of ``reelquant serve`` in a real Chromium: a whole visit, and that nothing outside of its folder and machine is asked for."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from reelquant.serve.folder import Folder
from reelquant.serve.work import Queue
from tests import processes
from tests.e2e.chromium import chromium
from tests.unit.serve.models import evaluation

pytest.importorskip("gradio", reason="needs gradio: pip install 'reelquant[serve]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # gradio asks old things of pandas with every event
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # and leaves event loops and their sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 120_000  # milliseconds that a step of a visit may take; on an idle machine a few seconds are enough


@dataclass(frozen=True)
class Forked:
    """A process of the test's fork server, which has imported torch already."""

    process: Any

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def forked(words: list[str], folder: Path, out: Path, err: Path) -> Forked:
    for file in (out, err):
        file.touch()
    return Forked(processes.reelquant(words, err, partial(os.chdir, folder), out))


@dataclass(frozen=True)
class Visited:
    """A server in a thread of this process."""

    root: Path
    address: str
    port: int


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visited]:
    import uvicorn

    from reelquant.serve import server

    root = tmp_path_factory.mktemp("outside") / "served"
    evaluation(root / "proof", test={"name": "q"}, reference={"name": "f"}, gate={"preset": "default", "passed": True}, clips=4)
    (root.parent / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to("../secret.txt")
    folder = Folder(root)
    with closing(server.bound("127.0.0.1", 0)) as listening, closing(Queue(folder, forked)) as queue:
        running = uvicorn.Server(uvicorn.Config(server.application(folder, queue, "127.0.0.1", forked), log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Visited(root, server.address(listening), listening.getsockname()[1])
        running.should_exit = running.force_exit = True
        thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of what gradio left, before another test hears of it
        gc.collect()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any, visited: Visited) -> Iterator[Any]:
    """The page, opened. Errors on it, and requests to anything but its server, fail the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.set_default_timeout(SECONDS)
    opened.goto(visited.address)
    opened.locator("rq-jobs").wait_for()
    opened.wait_for_function("[...document.querySelectorAll('input')].some(one => one.value.startsWith('tiny-dit'))")  # lists have come
    yield opened
    context.close()
    assert [url for url in asked if not url.startswith((visited.address, "data:", "blob:"))] == []
    assert said == []


def choose(page: Any, label: str, option: str) -> None:
    """Choose from a list on the tab that is open."""
    page.get_by_label(label).locator("visible=true").first.click()
    page.get_by_role("option", name=option, exact=True).click()


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def ended(page: Any) -> tuple[str, str]:
    """State and words of the newest job, once it has ended."""
    job = page.locator("rq-jobs li:first-child:not([data-state=waiting], [data-state=running])")
    return job.get_attribute("data-state"), job.locator(".words").inner_text()


def drawn(page: Any) -> list[int]:
    """A few pixels of the player's canvas, from the middle of the left half and of the right half."""
    return page.evaluate("""() => {
        const canvas = document.querySelector('rq-player').shadowRoot.querySelector('canvas');
        const copy = document.createElement('canvas');
        Object.assign(copy, {width: canvas.width, height: canvas.height});
        const context = copy.getContext('2d', {willReadFrequently: true});
        context.drawImage(canvas, 0, 0);
        const row = (x) => [...context.getImageData(x, 0, 1, canvas.height).data];
        return [...row(canvas.width / 4), ...row(3 * canvas.width / 4)];
    }""")


def test_a_visit_from_the_plan_to_the_blind_test(page: Any, visited: Visited) -> None:
    choose(page, "Recipe", "w8a16")
    page.get_by_label("Name of the new folder").fill("small")
    begin = page.get_by_role("button", name="Quantize", exact=True)
    assert begin.is_disabled(), "the plan comes first"
    press(page, "Show the plan")
    page.locator(".rq-plan h3").wait_for()
    assert page.locator(".rq-tiles dd b").first.inner_text() == "63 of 67"
    assert page.locator(".rq-scroll tbody tr").count() == 67
    begin.click()
    page.locator("rq-jobs li").wait_for()
    state, words = ended(page)
    assert state == "done" and "3.47x smaller" in words, words
    assert json.loads((visited.root / "small" / "report.json").read_text())["recipe"] == "w8a16"

    tab(page, "Compare")
    choose(page, "Quantized pipeline", "small (w8a16)")
    page.get_by_label("Steps").locator("visible=true").fill("2")
    press(page, "Make both clips")
    player = page.locator("rq-player")
    player.locator("canvas").wait_for()
    first = drawn(page)
    player.locator("#scrub").fill("9")
    player.locator("output").get_by_text("10 / 13").wait_for()
    later = drawn(page)
    half = len(first) // 2
    assert first[:half] != later[:half] and first[half:] != later[half:], "one scrubber moves both clips"

    player.locator("[data-mode=wipe]").click()
    wiped = []
    for place in ("0", "1000"):
        player.locator("#wipe").fill(place)
        wiped.append(drawn(page))
    assert wiped[0] != wiped[1], "float and quantized differ, and the wipe shows which"

    player.locator("[data-mode=blind]").click()
    assert player.locator(".names").inner_text().split() == ["left", "right"]
    player.locator("[data-choice=left]").click()
    player.locator("[data-choice=next]").wait_for()
    names = player.locator(".names").inner_text().split()
    assert sorted(names) == ["float", "quantized"] and f"You picked {names[0]}" in player.locator(".verdict").inner_text()
    [votes] = visited.root.glob(".reelquant/comparisons/*/votes.json")
    assert json.loads(votes.read_text()) == {"votes": [names[0]]}


def test_a_running_job_is_cancelled_and_outlives_a_reload(page: Any, visited: Visited) -> None:
    press(page, "Show the plan")  # of the recipe that is offered first, which calibrates
    page.locator(".rq-plan h3").wait_for()
    press(page, "Quantize")
    job = page.locator("rq-jobs li").first
    job.get_by_text("sampling").wait_for()
    page.reload()
    job.get_by_role("button", name="Cancel").click()
    state, words = ended(page)
    assert state == "cancelled" and "finished work is in" in words, words
    assert job.get_by_role("button", name="Start again").is_visible()
    shutil.rmtree(visited.root / "tiny-dit-qvd-w8a8.partial")


def test_a_refused_form_is_one_sentence_and_no_job(page: Any, visited: Visited) -> None:
    page.get_by_label("Name of the new folder").fill("../<b>out")
    press(page, "Show the plan")
    page.get_by_text("'../<b>out' does not name a new folder within the served one").wait_for()
    assert page.get_by_role("button", name="Quantize", exact=True).is_disabled()


def test_evaluations_are_listed_and_a_report_is_shut_in(page: Any) -> None:
    tab(page, "Evaluate")
    assert page.locator(".rq-evaluations .rq-pill").inner_text() == "gate default passed"
    choose(page, "Look at a report here", "proof")
    page.frame_locator(".rq-report iframe").locator("#mark").wait_for()
    frame = page.frames[1]
    assert frame.evaluate("window.origin") == "null", "its scripts have an origin of their own, which this server refuses"


def test_no_sideways_scrolling_on_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for scheme, name in (("light", "Compare"), ("dark", "Evaluate"), ("light", "Quantize")):
        page.emulate_media(color_scheme=scheme)
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


def status(address: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file={root}/proof/report.html",
        "gradio_api/file={root}/../secret.txt",
        "gradio_api/file={root}/link.txt",
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../etc/passwd",
        "file={root}/../secret.txt",
        "assets/..%2f..%2f..%2fsecret.txt",
        "static/%2e%2e/%2e%2e/config.json",
        "reelquant/reports/..%2f",
        "reelquant/reports/%2fetc",
        "reelquant/assets/page.css",
        "reelquant/comparisons/..%2f..%2fproof",
    ],
)
def test_no_route_opens_another_file(visited: Visited, path: str) -> None:
    assert status(f"{visited.address}/{path.format(root=visited.root)}") in (400, 403, 404)
    assert status(f"{visited.address}/reelquant/reports/proof") == 200


def test_the_server_listens_on_localhost_alone_and_answers_to_its_own_name(visited: Visited) -> None:
    found = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [one.ip for one in found if one.port == visited.port] == ["127.0.0.1"]
    assert status(visited.address) == 200 and status(visited.address, Host="attacker.example") == 421
