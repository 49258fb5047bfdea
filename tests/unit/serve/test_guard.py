"""Which requests are answered: those of the page itself, to its own paths, on this machine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reelquant.serve.guard import Guard, Scope


async def echo(scope: Scope, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"own")]})
    await send({"type": "http.response.body", "body": b"in"})


def ask(
    path: str = "/", method: str = "GET", host: str = "127.0.0.1:7860", bound: str = "127.0.0.1", **headers: str
) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer."""
    told = {"host": host} | {key.replace("_", "-"): value for key, value in headers.items()}
    scope = {"type": "http", "method": method, "path": path, "headers": [(key.encode(), value.encode()) for key, value in told.items()]}
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    asyncio.run(Guard(echo, bound)(scope, receive, send))
    return sent[0]["status"], {key.decode(): value.decode() for key, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("host", "bound", "status"),
    [
        ("127.0.0.1:7860", "127.0.0.1", 200),
        ("localhost:7860", "127.0.0.1", 200),
        ("[::1]:7860", "::1", 200),
        ("192.168.1.2:7860", "0.0.0.0", 200),
        ("Workstation:7860", "workstation", 200),
        ("attacker.example:7860", "127.0.0.1", 421),
        ("localhost.attacker.example", "127.0.0.1", 421),
        ("", "127.0.0.1", 421),
        ("[", "127.0.0.1", 421),
    ],
)
def test_a_name_that_others_let_point_here_is_refused(host: str, bound: str, status: int) -> None:
    assert ask(host=host, bound=bound)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://attacker.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
    ],
)
def test_other_pages_change_nothing(headers: dict[str, str], status: int) -> None:
    assert ask("/gradio_api/queue/join", "POST", **headers)[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://example.org",
        "/gradio_api/stream/x",
        "/gradio_api/run/predict",
        "/gradio_api/call/x",
        "/gradio_api/info",
        "/gradio_api/queue/../file=/etc/passwd",
        "/assets/../../../etc/passwd",
        "/reelquant/reports/../../x",
        "/monitoring",
        "/custom_component/1/client/component/x",
        "/docs",
    ],
)
def test_routes_that_the_forms_do_not_use_are_not_there(path: str) -> None:
    assert ask(path)[0] == 404


def test_answers_forbid_to_load_anything_from_elsewhere() -> None:
    status, headers = ask("/assets/index.js")
    assert status == 200 and headers["cache-control"] == "own", "a header of the answer stays"
    sources = headers["content-security-policy"]
    assert "default-src 'none'" in sources and "http" not in sources and "*" not in sources
    assert "frame-ancestors 'self'" in sources and headers["x-content-type-options"] == "nosniff"
