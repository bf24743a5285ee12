"""Columns as JSON and CSV text, by Arrow: Python would take a second over 100,000 rows.

Numbers are written with the fewest digits that say which number they are, in the precision in which
they are stored.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv


def json_values(values: Any) -> pa.Array:
    """Each of an Arrow array's values as JSON; what is no number there is null.

    >>> json_values(pa.array([0.1, None, float("nan")], pa.float32())).to_pylist()
    ['0.1', 'null', 'null']
    >>> json_values(pa.array(["a", None])).to_pylist()
    ['"a"', 'null']
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    kind = values.type
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_finite(values), values, None)
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return pc.fill_null(values.cast(pa.string()), "null")
    if not pa.types.is_dictionary(kind):
        if not pa.types.is_string(kind):
            return pa.array([json.dumps(plain(value)) for value in values.to_pylist()], pa.string())
        values = values.dictionary_encode()
    words = pa.array(
        [json.dumps(plain(word)) for word in values.dictionary.to_pylist()], pa.string()
    )
    return pc.fill_null(words.take(values.indices), "null")


def json_rows(columns: Mapping[str, Any]) -> bytes:
    """A list of objects, one a row, whose values are JSON already (as of `json_values`).

    >>> json_rows({"a": pa.array(["1", "2"]), "b": pa.array(['"x"', "null"])})
    b'[{"a":1,"b":"x"},{"a":2,"b":null}]'
    """
    parts: list[Any] = []
    for name, values in columns.items():
        parts += [f"{',' if parts else '{'}{json.dumps(name)}:", values]
    rows = pc.binary_join_element_wise(*parts, "}", "")
    whole: bytes = joined(rows, [0, len(rows)])[0].as_buffer().to_pybytes()
    return b"[" + whole + b"]"


def joined(texts: pa.Array, bounds: Sequence[int] | np.ndarray[Any, Any]) -> pa.Array:
    """The texts between each two bounds, with commas between them."""
    lists = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), texts)
    return pc.binary_join(lists, ",")


def csv_rows(columns: Mapping[str, Any]) -> bytes:
    """A head line, and a line a row."""
    to = io.BytesIO()
    pyarrow.csv.write_csv(pa.table({name: _cells(column) for name, column in columns.items()}), to)
    return to.getvalue()


def plain(value: Any) -> Any:
    """As JSON has it: no NaN, times as text."""
    if value is None or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _cells(values: Any) -> Any:
    kind = values.type
    if pa.types.is_list(kind):
        return json_values(values)
    if pa.types.is_timestamp(kind):
        return pa.array([plain(value) for value in values.to_pylist()], pa.string())
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_finite(values), values, None)
    return values.cast(kind.value_type) if pa.types.is_dictionary(kind) else values
