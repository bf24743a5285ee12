"""Which rows stay on a page of metrics from one measurement to the next."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from monitor.record import ProbeSpec
from monitor.sinks.exposition import scalar_fields


class Best:
    """The rows of a table that are shown where there is no room for all.

    First come those that were ever the best in some field, then the second best: by what a row
    reached at any time, so that it does not come and go with the noise.
    """

    def __init__(self) -> None:
        self._reached: pd.DataFrame | None = None

    def see(self, spec: ProbeSpec, table: pa.Table) -> pd.DataFrame:
        """What the rows of a table, whose rows count, have reached with it, by their dimensions."""
        dims = [dim.name for dim in spec.dims]
        fields = [field.name for field in scalar_fields(spec)]
        values = table.select([*dims, *fields]).to_pandas()
        values = values.set_index(dims) if dims else values
        # Rows and fields that only one of them has are those of the other.
        best: pd.DataFrame = np.fmax(values, values if self._reached is None else self._reached)
        self._reached = best
        reached: pd.DataFrame = best.loc[values.index, fields]
        return reached

    def fitting(self, spec: ProbeSpec, table: pa.Table, rows: int) -> pa.Table:
        """At most `rows` rows of a table, which is seen where it has more."""
        if len(table) <= rows:
            return table
        reached = self.see(spec, table).to_numpy(dtype=np.float64)
        # The best of every field, then the second best of every field, and so on.
        order = np.argsort(-reached, axis=0, kind="stable")
        placed = order[~np.isnan(np.take_along_axis(reached, order, axis=0))]
        return table.take(np.sort(pd.unique(placed)[:rows]))


def lasting(spec: ProbeSpec, old: pa.Table | None, new: pa.Table) -> pa.Table:
    """The rows of a table that lasts, with those of earlier ones that they do not replace."""
    if old is None:
        return new
    dims = [dim.name for dim in spec.dims]
    kept = old.join(new.select(dims), dims, join_type="left anti")
    return pa.concat_tables([kept.select(new.column_names), new]).combine_chunks()
