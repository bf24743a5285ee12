"""Measurements kept in memory: for tests, and where nothing may be written."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from monitor.record import Measurement


class MemorySink:
    """Keeps every measurement in a list."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []

    def write(self, measurement: Measurement) -> None:
        """Appends the measurement."""
        self.measurements.append(measurement)

    def read(self, table: str) -> pd.DataFrame:
        """All rows of one table, in the order in which they arrived."""
        readings = [r for m in self.measurements for r in m.readings if r.spec.name == table]
        frame: pd.DataFrame = pa.concat_tables([r.table for r in readings]).to_pandas()
        return frame

    def close(self) -> None:
        """Keeps what there is: it can still be read."""
