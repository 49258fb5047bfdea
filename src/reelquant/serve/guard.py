"""What the page answers at all: requests from its own page, to the paths that it needs.

A server on localhost is reached by every page that the same browser has open, and by names that an attacker lets point to 127.0.0.1. So
requests that change something must come from this page (``Origin``), and every request must name this machine (``Host``): by an address,
``localhost``, or the name that ``--host`` gave. Of gradio's routes only those that the forms use are answered: none of its routes for
files, uploads, other servers or streams.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

EXACT = frozenset(
    {
        "/",
        "/config",
        "/favicon.ico",
        "/theme.css",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/gradio_api/cancel",
        "/gradio_api/reset",
    }
)
BELOW = ("/assets/", "/static/", "/gradio_api/heartbeat/", "/reelquant/")
SAFE = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; frame-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'self'"
)  # gradio's templates need unsafe-inline and unsafe-eval; nothing is loaded from elsewhere
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


class Guard:
    """An ASGI application in front of another.

    Args:
        app: the other one.
        host: what the server was told to bind to.
    """

    def __init__(self, app: App, host: str) -> None:
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        if (refused := self._refused(scope)) is not None:
            return await _answer(send, *refused)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {key for key, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((key, value) for key, value in HEADERS.items() if key not in own)]
            await send(message)

        return await self._app(scope, receive, with_headers)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        host, path = headers.get(b"host", ""), scope["path"]
        if not self._names_us(host):
            return 421, f"this page answers to addresses, localhost and the name of --host; got the host '{host:.80}'"
        origin = headers.get(b"origin")
        if scope["method"] not in SAFE and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "this request comes from another page and is refused"
        if scope["method"] not in SAFE and headers.get(b"sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "this request comes from another page and is refused"
        if ".." in path.split("/") or not (path in EXACT or path.startswith(BELOW)):
            return 404, "not a part of this page"
        return None

    def _names_us(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            return name in ("localhost", self._host) or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


async def _answer(send: Send, status: int, words: str) -> None:
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
