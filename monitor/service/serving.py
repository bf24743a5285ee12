"""The endpoints, declared once: what is routed is what `/openapi.json` says."""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from monitor.service import charting, pages, telling
from monitor.service.charting import Asked, Charts
from monitor.service.describing import ENDPOINTS, described
from monitor.service.events import News
from monitor.service.following import Folder, UnknownRunError
from monitor.service.gathering import Gatherer
from monitor.service.leading import Leads
from monitor.sinks.prometheus import bound_socket

_log = logging.getLogger("phasewatch")

_POLL, _HEARTBEAT = 1.0, 15.0


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
        self._gatherer = Gatherer(self._folder)
        self._leads = Leads(self._folder)
        self._charts = Charts(self._folder, self._gatherer)
        bound = bound_socket(host, port, "runs")
        name, number = bound.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{number}"
        by_path = {
            "/runs": self._index,
            "/api/runs": self._runs,
            "/api/tables": self._tables,
            "/api/series": self._series,
            "/api/rows": self._rows,
            "/api/transitions": self._transitions,
            "/api/leads": self._leading,
            "/api/events": self._events,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/openapi.json": self._openapi,
        }
        app = Starlette(
            routes=[
                *(Route(path, by_path[path]) for path in ENDPOINTS),
                Route("/", self._page),
                Route("/page/{name:path}", self._page),
            ],
            exception_handlers={
                HTTPException: _refused,
                ValueError: _wrong,
                UnknownRunError: _absent,
            },
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
        self._gatherer.close()
        self._leads.close()

    def _page(self, request: Request) -> Response:
        told = pages.answer(request.path_params.get("name", "index.html"))
        if told is None:
            raise HTTPException(404)
        return told

    def _index(self, _request: Request) -> Response:
        rows = "".join(
            f'<tr><th scope="row"><a href="/api/tables?run={quote(run["run"])}">'
            f"{html.escape(run['run'])}</a></th><td>{run['state']}</td><td>{run['last_step']}</td></tr>"
            for run in telling.runs(self._folder)
        )
        found = (
            "<table><caption>Runs</caption><tr><th scope=col>Run</th><th scope=col>State</th>"
            f"<th scope=col>Last step</th></tr>{rows}</table>"
            if rows
            else f"<p>No runs in {html.escape(str(self._folder.root))} yet.</p>"
        )
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>phasewatch</title>'
            f'<h1>phasewatch</h1>{found}<p><a href="/metrics">Metrics</a> '
            '<a href="/openapi.json">Endpoints</a></p></html>'
        )

    def _runs(self, _request: Request) -> Response:
        return JSONResponse(telling.runs(self._folder))

    def _tables(self, request: Request) -> Response:
        return JSONResponse(telling.tables(self._folder, _needed(request, "run")))

    def _transitions(self, request: Request) -> Response:
        runs, axis = _runs_of(request), request.query_params.get("axis", "step")
        return JSONResponse(charting.transitions(self._folder, self._gatherer, runs, axis))

    def _leading(self, request: Request) -> Response:
        axis = request.query_params.get("axis", "step")
        return JSONResponse(self._leads.told(_runs_of(request), axis))

    def _series(self, request: Request) -> Response:
        asked = request.query_params
        known = ENDPOINTS["/api/series"].takes
        text, kind = self._charts.series(
            _runs_of(request),
            Asked(
                table=_needed(request, "table"),
                field=_needed(request, "field"),
                axis=asked.get("axis", "step"),
                dims={name: value for name, value in asked.items() if name not in known},
                points=_count(request, "points", 4, 100_000) or 1_000,
                top=_count(request, "top", 1, 1_000),
            ),
            asked.get("format", "json"),
        )
        return Response(text, media_type=kind)

    def _rows(self, request: Request) -> Response:
        text, kind = charting.rows(
            self._folder,
            _needed(request, "run"),
            table=_needed(request, "table"),
            step=_count(request, "step", 0, 2**62),
            fields=request.query_params.getlist("field"),
            form=request.query_params.get("format", "columns"),
        )
        return Response(text, media_type=kind)

    async def _events(self, _request: Request) -> Response:
        return StreamingResponse(self._told(), media_type="text/event-stream")

    async def _told(self) -> AsyncIterator[str]:
        news = News(await anyio.to_thread.run_sync(telling.latest, self._folder))
        yield ": connected\n\n"
        said = time.monotonic()
        while not self._server.should_exit:
            await anyio.sleep(_POLL)
            for event in news.look(await anyio.to_thread.run_sync(telling.latest, self._folder)):
                said = time.monotonic()
                yield event
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
        return JSONResponse(described())


def _runs_of(request: Request) -> list[str]:
    _needed(request, "run")
    return [*dict.fromkeys(request.query_params.getlist("run"))]


def _count(request: Request, name: str, least: int, most: int) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"{name}={text!r}: expected a whole number from {least} to {most}")
    return int(text)


def _needed(request: Request, name: str) -> str:
    if not (value := request.query_params.get(name)):
        raise ValueError(f"no {name}= in the query: expected one; add {name}=…")
    return value


def _error(status: int, error: str, expected: str, do: str) -> Response:
    return JSONResponse({"error": error, "expected": expected, "do": do}, status)


async def _wrong(request: Request, error: Exception) -> Response:
    expected = ENDPOINTS[request.url.path].help
    return _error(400, str(error), expected, "see /openapi.json and /api/tables?run=…")


async def _absent(_request: Request, error: Exception) -> Response:
    run, known = error.args
    return _error(404, f"no run {run!r}", f"one of {known}", "see /api/runs")


async def _refused(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    at = f"{request.method} {request.url.path}"
    return _error(
        status, f"{at} is not served", f"GET of one of {[*ENDPOINTS]}", "see /openapi.json"
    )
