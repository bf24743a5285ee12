"""Reading the tables back: pandas for one table, DuckDB for questions across them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from monitor.record import dims_of, expect_one_of, is_ours

_PARTITION = ds.partitioning(pa.schema([("run", pa.string())]), flavor="hive")


def tables(root: str | Path) -> list[str]:
    """Names of the tables under `root`, sorted.

    Raises `FileNotFoundError` where there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected the root= of a run")
    return sorted(
        table.name
        for table in folder.iterdir()
        if not table.name.startswith(("_", "."))
        and (newest := _newest(table)) is not None
        and is_ours(pq.read_schema(newest))
    )


def read(root: str | Path, table: str, run: str | None = None) -> pd.DataFrame:
    """One table as a data frame, of one run or of all runs, in order of run, step and dimensions.

    What a restart superseded is not in it. Values that were not measured, or are not finite, are
    NaN, and `validity` says why. Raises `FileNotFoundError` where there is no such folder and
    `ValueError` where there is no such table or run.
    """
    expect_one_of(f"table in {root}", table, tables(root))
    folder = Path(root) / table
    runs = sorted(path.name.removeprefix("run=") for path in folder.glob("run=*"))
    if run is not None:
        expect_one_of(f"run in {folder}", run, runs)
        runs = [run]
    # A run may have been recorded with other fields: the columns are those of all of them.
    newest = [path for name in runs if (path := _newest(folder / f"run={name}")) is not None]
    stored = [pq.read_schema(path) for path in newest]
    schema = pa.unify_schemas([one.remove_metadata() for one in stored])
    data = ds.dataset(
        folder,
        format="parquet",
        partitioning=_PARTITION,
        schema=schema.insert(0, pa.field("run", pa.string())),
    )
    frame: pd.DataFrame = data.to_table(filter=ds.field("run").isin(runs)).to_pandas()
    dims = dict.fromkeys(dim for one in stored for dim in dims_of(one))
    keys = [name for name in ("run", "step", "attempt", *dims) if name in frame]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def connect(root: str | Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with one view a table, which shows new measurements as they arrive.

    Raises `FileNotFoundError` where there is no such folder.
    """
    connection = duckdb.connect()
    for table in tables(root):
        files = str((Path(root) / table).resolve() / "run=*" / "*.parquet").replace("'", "''")
        connection.execute(
            # The table is one of ours and the path is quoted.
            f"CREATE VIEW \"{table}\" AS SELECT * FROM read_parquet('{files}', "  # noqa: S608
            "union_by_name=true, hive_partitioning=true, hive_types={'run': VARCHAR})"
        )
    return connection


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("**/*.parquet"), key=lambda path: path.name, default=None)
