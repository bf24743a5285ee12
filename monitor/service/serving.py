"""The endpoints, declared once: what is routed is what `/openapi.json` says."""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from monitor.service import pages, telling
from monitor.service.following import Folder
from monitor.sinks.prometheus import bound_socket

_log = logging.getLogger("phasewatch")

_POLL, _HEARTBEAT = 1.0, 15.0

# By path: what it answers, and its parameters with whether each is needed.
_PATHS: dict[str, tuple[str, dict[str, bool]]] = {
    "/": ("The live page.", {}),
    "/page/{name:path}": ("A file of the live page.", {}),
    "/api/runs": ("Every run and its state.", {}),
    "/api/tables": ("The tables of a run, as their probes declare them.", {"run": True}),
    "/api/series": (
        "A field along an axis. Other parameters are dimensions, such as layer=3; run can repeat.",
        dict.fromkeys(("run", "table", "field"), True)
        | dict.fromkeys(("axis", "points", "format"), False),
    ),
    "/api/transitions": ("What was said of changes in a run.", {"run": True}),
    "/api/events": ("Server-sent events: one for each new measurement.", {}),
    "/metrics": ("The latest values of all runs, for Prometheus.", {}),
    "/healthz": ("Whether the service lives.", {}),
    "/readyz": ("Whether the root can be read.", {}),
    "/openapi.json": ("This description.", {}),
}


class Service:
    """Serves the runs under `root`, read-only, at `url`, until `close`.

    Where `port` is taken the next free one is used (0: any free one). `budget` is the most series
    that a table of a run takes on the metrics page. Raises `OSError` where nothing can listen.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 8787,
        budget: int = 2_000,
    ) -> None:
        self._folder, self._budget = Folder(Path(root)), budget
        bound = bound_socket(host, port, "runs")
        name, number = bound.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{number}"
        by_path = {
            "/": self._page,
            "/page/{name:path}": self._page,
            "/api/runs": self._runs,
            "/api/tables": self._tables,
            "/api/series": self._series,
            "/api/transitions": self._transitions,
            "/api/events": self._events,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/openapi.json": self._openapi,
        }
        app = Starlette(
            routes=[Route(path, by_path[path]) for path in _PATHS],
            exception_handlers={HTTPException: _refused, ValueError: _wrong, LookupError: _absent},
        )
        settings = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, args=([bound],), name="phasewatch-service", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the service has stopped."""
        self._thread.join()

    def close(self) -> None:
        """Stops listening."""
        self._server.should_exit = True
        self._thread.join(timeout=5)

    def _page(self, request: Request) -> Response:
        told = pages.answer(request.path_params.get("name", "index.html"))
        if told is None:
            raise HTTPException(404)
        return told

    def _runs(self, _request: Request) -> Response:
        return JSONResponse(telling.runs(self._folder))

    def _tables(self, request: Request) -> Response:
        return JSONResponse(telling.tables(self._folder, _needed(request, "run")))

    def _transitions(self, request: Request) -> Response:
        return JSONResponse(telling.transitions(self._folder, _needed(request, "run")))

    def _series(self, request: Request) -> Response:
        asked = request.query_params
        table, field = _needed(request, "table"), _needed(request, "field")
        _needed(request, "run")
        points, form = asked.get("points", "1000"), asked.get("format", "json")
        if not (points.isascii() and points.isdecimal() and 4 <= int(points) <= 100_000):
            raise ValueError(f"points={points!r}: expected a whole number from 4 to 100000")
        if form not in ("json", "csv"):
            raise ValueError(f"format={form!r}: expected json or csv")
        dims = {k: v for k, v in asked.items() if k not in _PATHS["/api/series"][1]}
        rows = [
            row
            for run in dict.fromkeys(asked.getlist("run"))
            for row in telling.series(
                self._folder,
                run,
                table=table,
                field=field,
                axis=asked.get("axis", "step"),
                dims=dims,
                points=int(points),
            )
        ]
        if form == "json":
            return JSONResponse(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return Response(text.getvalue(), media_type="text/csv")

    async def _events(self, _request: Request) -> Response:
        return StreamingResponse(self._told(), media_type="text/event-stream")

    async def _told(self) -> AsyncIterator[str]:
        known = await anyio.to_thread.run_sync(telling.latest, self._folder)
        yield ": connected\n\n"
        said = time.monotonic()
        while not self._server.should_exit:
            await anyio.sleep(_POLL)
            now = await anyio.to_thread.run_sync(telling.latest, self._folder)
            for run, step in now.items():
                if known.get(run) != step:
                    said = time.monotonic()
                    told = json.dumps({"run": run, "step": step})
                    yield f"event: measurement\ndata: {told}\n\n"
            known = now
            if time.monotonic() - said > _HEARTBEAT:
                said = time.monotonic()
                yield ": still here\n\n"

    def _metrics(self, request: Request) -> Response:
        page = telling.page(self._folder, self._budget)
        text, kind = page.text(request.headers.get("Accept", ""))
        return Response(text, headers={"Content-Type": kind})

    def _healthz(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _readyz(self, _request: Request) -> Response:
        if not self._folder.root.is_dir():
            return _error(503, f"no folder {self._folder.root}", "a folder", "make it, or wait")
        return JSONResponse({"status": "ok"})

    def _openapi(self, _request: Request) -> Response:
        return JSONResponse(_described())


def _described() -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": "phasewatch", "version": "1"},
        "paths": {
            path: {
                "get": {
                    "summary": summary,
                    "parameters": [
                        {
                            "name": name,
                            "in": "query",
                            "required": need,
                            "schema": {"type": "string"},
                        }
                        for name, need in parameters.items()
                    ],
                    "responses": {"200": {"description": summary}},
                }
            }
            for path, (summary, parameters) in _PATHS.items()
        },
    }


def _needed(request: Request, name: str) -> str:
    if not (value := request.query_params.get(name)):
        raise ValueError(f"no {name}= in the query: expected one; add {name}=…")
    return value


def _error(status: int, error: str, expected: str, do: str) -> Response:
    return JSONResponse({"error": error, "expected": expected, "do": do}, status)


async def _wrong(request: Request, error: Exception) -> Response:
    expected, _ = _PATHS[request.url.path]
    return _error(400, str(error), expected, "see /openapi.json and /api/tables?run=…")


async def _absent(_request: Request, error: Exception) -> Response:
    run, known = error.args
    return _error(404, f"no run {run!r}", f"one of {known}", "see /api/runs")


async def _refused(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    at = f"{request.method} {request.url.path}"
    return _error(status, f"{at} is not served", f"GET of one of {[*_PATHS]}", "see /openapi.json")
