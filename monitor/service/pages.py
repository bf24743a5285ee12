"""The files of the page: they come with the package, and nothing of it from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What the page shows comes from tables that anyone may have written: it runs no script but its own,
# and asks nobody but the service.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def files() -> dict[str, Path]:
    """Every file of the page by its name, such as `main.js` or `vendor/uPlot.min.css`."""
    return {
        path.relative_to(FOLDER).as_posix(): path
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in _KINDS
    }


def answer(name: str) -> Response | None:
    """A file of the page, or None where there is none of this name."""
    path = files().get(name)
    if path is None:
        return None
    return Response(path.read_bytes(), media_type=_KINDS[path.suffix], headers=_HEADERS)
