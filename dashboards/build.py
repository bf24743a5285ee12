"""Writes dashboards/grafana/*.json from the probes' declarations: `make dashboards`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from dashboards import boards, panels
from dashboards.boards import Board
from dashboards.rows import Row
from dashboards.variables import marks, variables

FOLDER = Path(__file__).with_name("grafana")

_COLUMNS = 24
_TAG = "phasewatch"


def pages() -> dict[str, str]:
    """Every dashboard as JSON, by the name of its file."""
    return {f"{board.name}.json": _page(board) for board in boards.BOARDS}


def _page(board: Board) -> str:
    rows = [(row, [panel.build() for panel in row.panels]) for row in board.rows()]
    shown = json.dumps([made for _, made in rows], cls=JSONEncoder)
    made = (
        builders.Dashboard(f"phasewatch: {board.title}")
        .uid(f"phasewatch-{board.name}")
        .description(board.description)
        .tags([_TAG])
        .timezone("browser")
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .links(_links())
    )
    marked = marks() if "timeseries" in shown else []
    made.annotations(marked)
    used = shown + json.dumps([mark.build() for mark in marked], cls=JSONEncoder)
    made.variables(variables(used + panels.LIVE_PAGE))
    built = made.build()
    for variable in built.templating.list_val or ():
        # Of variables that are intervals alone; the schema has them of no others.
        variable.auto = variable.auto_min = variable.auto_count = None
    built.panels = list(_laid_out(rows))
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _links() -> list[Builder[models.DashboardLink]]:
    others = builders.DashboardLink("Dashboards").tags([_TAG]).as_dropdown(True)
    live = builders.DashboardLink("Live page").url(panels.LIVE_PAGE).target_blank(True)
    return [
        others.type(models.DashboardLinkType.DASHBOARDS).keep_time(True).include_vars(True),
        live.type(models.DashboardLinkType.LINK),
    ]


def _laid_out(
    rows: Sequence[tuple[Row, list[models.Panel]]],
) -> Iterator[models.Panel | models.RowPanel]:
    """The panels of each row from left to right, as many beside each other as fit, with places that
    hold when every row is open; of a closed row the panels are in the row.
    """
    y, identity = 0, 1
    for row, made in rows:
        head = models.RowPanel(title=row.title, collapsed=row.closed, id_val=identity)
        head.grid_pos = models.GridPos(h=1, w=_COLUMNS, x=0, y=y)
        y, x, identity, tallest = y + 1, 0, identity + 1, 0
        for panel, (width, height) in zip(made, row.sizes, strict=True):
            if x + width > _COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            panel.grid_pos = models.GridPos(h=height, w=width, x=x, y=y)
            panel.id_val = identity
            x, identity, tallest = x + width, identity + 1, max(tallest, height)
        y += tallest
        if row.closed:
            head.panels = made
            yield head
        else:
            yield head
            yield from made


def write() -> None:
    """Writes the dashboards, and removes those that are no longer made."""
    made = pages()
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    write()
