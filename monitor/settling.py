"""When the directions of concepts settled: how each one lies to the one that it became."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from monitor.query import read

_OF = ["run", "layer", "concept", "method"]


def settling(root: str | Path, run: str | None = None) -> pd.DataFrame:
    """The cosine of every direction with the last one of the same concept in its run.

    One row for each run, layer, concept, method and step at which it could be fitted, with `cosine`
    and with `cosine_null`, what noise alone leaves of it: two estimates of one direction, fitted on
    different tokens, are expected to have it (from the split halves of both; see `concepts` in the
    page on tables). A direction can have settled where its cosine is no longer below that, and no
    earlier: as all are fitted on the same tokens it may still turn a little afterwards. It is told
    from the end, with hindsight: while a run goes on `drift_previous` in `concepts` is what there
    is.

    Raises what `monitor.read` raises, where there is no table of directions say.
    """
    vectors = read(root, "directions", run)
    reliable = read(root, "concepts", run)[[*_OF, "step", "split_half"]]
    rows = vectors[vectors["validity"] == "ok"].merge(reliable, on=[*_OF, "step"])
    parts = [_to_the_last(part) for _, part in rows.groupby(_OF, sort=False)]
    told = [*_OF, "step", "cosine", "cosine_null"]
    if not parts:
        return pd.DataFrame(columns=told)
    return pd.concat(parts, ignore_index=True)[told]


def _to_the_last(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one concept's directions in their order, with their cosines."""
    rows = rows.sort_values("step")
    vectors = np.stack([np.asarray(vector, dtype=float) for vector in rows["vector"]])
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    half = rows["split_half"].clip(lower=0)
    # Spearman and Brown: from half of the tokens to all of them.
    whole = 2 * half / (1 + half)
    return rows.assign(
        cosine=directions @ directions[-1], cosine_null=np.sqrt(whole * whole.iloc[-1])
    )
