"""Reading the tables back: pandas for one table, DuckDB for questions across them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from monitor.names import expect_one_of
from monitor.record import dims_of, is_ours

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
    data = ds.dataset(
        [str(path) for name in runs for path in sorted((folder / f"run={name}").glob("*.parquet"))],
        format="parquet",
        partitioning=_PARTITION,
        partition_base_dir=str(folder),
    )
    # Attempts may have recorded different fields: the columns are those of all of them.
    stored = [fragment.physical_schema for fragment in data.get_fragments()]
    columns = pa.unify_schemas([schema.remove_metadata() for schema in stored])
    data = data.replace_schema(columns.insert(0, pa.field("run", pa.string())))
    frame: pd.DataFrame = data.to_table().to_pandas()
    dims = dict.fromkeys(dim for one in stored for dim in dims_of(one))
    keys = [name for name in ("run", "step", "attempt", *dims) if name in frame]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def connect(root: str | Path, run: str | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with one view a table, of one run or of all runs, which shows new
    measurements as they arrive.

    Raises `FileNotFoundError` where there is no such folder; of a run that is in no table there is
    no view.
    """
    connection = duckdb.connect()
    for table in tables(root):
        folder = Path(root) / table
        if run is not None and not any((folder / f"run={run}").glob("*.parquet")):
            continue
        name = "*" if run is None else _glob_quoted(Path(run))
        files = f"{_glob_quoted(folder.resolve())}/run={name}/*.parquet"
        # Not by hive partitions: a folder further up may look like one. The table is one of ours.
        connection.execute(
            f"""CREATE VIEW "{table}" AS
            SELECT regexp_extract(filename, 'run=([^/]*)/[^/]*$', 1) AS run, * EXCLUDE filename
            FROM read_parquet('{files}', union_by_name=true, filename=true, hive_partitioning=false)
            """  # noqa: S608
        )
    return connection


def decoded(contexts: pd.Series, decode: Callable[[list[int]], str]) -> pd.Series:
    r"""The contexts of `top_neurons` as text, by what turns token ids into it: the `decode` of the
    model's own tokenizer. Line breaks are written as \n, and brackets stay around the token.

    >>> words = ["the", " king", " and", " queen"]
    >>> decode = lambda ids: "".join(words[token] for token in ids)
    >>> decoded(pd.Series(["0 1 [2] 3 | 0 [1]", None]), decode).tolist()
    ['the king[ and] queen | the[ king]', None]
    """

    def of_one(context: str) -> str:
        before, token, after = re.split(r"[\[\]]", context)
        text = [decode([int(id_) for id_ in ids.split()]) for ids in (before, token, after)]
        return "{}[{}]{}".format(*text).replace("\n", "\\n")

    def of_all(told: object) -> str | None:
        if not isinstance(told, str):
            return None
        return " | ".join(of_one(context) for context in told.split(" | ") if context)

    return pd.Series([of_all(told) for told in contexts], index=contexts.index, dtype=object)


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("**/*.parquet"), key=lambda path: path.name, default=None)


def _glob_quoted(folder: Path) -> str:
    """The folder's name in a quoted pattern that matches it and nothing else."""
    return re.sub(r"([*?[])", r"[\1]", folder.as_posix()).replace("'", "''")
