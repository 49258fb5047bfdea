"""The page's own routes: the state of jobs and comparisons as JSON, frames, reports, and what runs in the browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from reelquant._errors import ReelQuantError
from reelquant.serve import evaluations
from reelquant.serve.comparisons import Comparisons
from reelquant.serve.folder import Folder
from reelquant.serve.work import Queue

ASSETS = {"page.js": "text/javascript", "jobs.js": "text/javascript", "player.js": "text/javascript"}
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data: blob:; "
    "sandbox allow-scripts allow-downloads; frame-ancestors 'self'"
)  # a report is a file of the folder: its scripts get an origin of their own, which may ask this server for nothing


@dataclass(frozen=True)
class Served:
    """What the routes and the forms work on."""

    folder: Folder
    queue: Queue
    comparisons: Comparisons


def asset(name: str) -> str:
    """A file of ``assets/``."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def application(served: Served) -> FastAPI:
    """An application with these routes and no documentation pages."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ReelQuantError, _refused)
    app.get("/reelquant/assets/{name}")(_asset)
    _jobs(app, served)
    _comparisons(app, served)

    @app.get("/reelquant/reports/{name:path}")
    def report(name: str) -> Response:
        return FileResponse(evaluations.report(served.folder, name), headers={"content-security-policy": REPORT_POLICY})

    return app


def _jobs(app: FastAPI, served: Served) -> None:
    acts: dict[str, Callable[[str], Any]] = {"cancel": served.queue.cancel, "again": served.queue.again, "forget": served.queue.forget}

    @app.get("/reelquant/jobs")
    def jobs() -> list[dict[str, Any]]:
        return [job.shown() for job in served.queue.jobs()]

    @app.post("/reelquant/jobs/{number}/{act}")
    def act(number: str, act: str) -> Response:
        if act not in acts:
            return JSONResponse({"error": f"no '{act:.40}'; a job can be asked to {', '.join(acts)}"}, 404)
        acts[act](number)
        return JSONResponse({})


def _comparisons(app: FastAPI, served: Served) -> None:
    @app.get("/reelquant/comparisons/{number}")
    def comparison(number: str) -> dict[str, Any]:
        job = served.queue.job(number)
        return served.comparisons.shown(number) | {"job": None if job is None else job.shown()}

    @app.get("/reelquant/comparisons/{number}/{side}/{position}")
    def frame(number: str, side: str, position: int) -> Response:
        return FileResponse(served.comparisons.frame(number, side, position), media_type="image/png")

    @app.post("/reelquant/comparisons/{number}/votes")
    async def vote(number: str, request: Request) -> dict[str, Any]:
        try:
            told = await request.json()
        except ValueError:
            told = None
        return served.comparisons.vote(number, told.get("picked") if isinstance(told, dict) else None)


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 404 if request.method == "GET" else 409)


def _asset(name: str) -> Response:
    if name not in ASSETS:
        return JSONResponse({"error": "no such file"}, 404)
    return Response(asset(name), media_type=ASSETS[name])


def script_tags() -> str:
    """What the head of the page needs to run the assets."""
    return "".join(f'<script type="module" src="/reelquant/assets/{name}"></script>' for name in ASSETS)
