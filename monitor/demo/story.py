"""What happened in a run of the demo, told from its tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import monitor
from monitor.claims import INDUCTION_CIRCUIT
from monitor.demo.view import CONCEPTS, LAYER, followed
from monitor.terminal.saying import called, half_width

# No threshold fits every model; in this one it lies far above the null and below where heads end.
_FORMED = 0.4


def story(root: Path, run: str) -> str:
    """One paragraph on what formed when, in the words of the tables of `run`."""
    heads = monitor.read(root, "induction", run=run)
    in_context = monitor.read(root, "in_context", run=run)
    sentences = [
        _head(heads, "previous_token", "attends to the position before its own"),
        _head(heads, "prefix_matching", "attends to what followed earlier copies of its token"),
        _score(in_context),
    ]
    if _formed(heads, "prefix_matching") is not None:
        sentences.append(_cause(root, run))
    return " ".join([*sentences, *_noticed(root, run), *_directions(root, run)])


def how_to_query(root: Path, run: str) -> str:
    """Lines of Python that read the run's tables."""
    return (
        "import monitor\n"
        f'monitor.read("{root}", "induction", run="{run}")  # pandas: one row a step and head\n'
        f'monitor.connect("{root}").sql("SELECT step, max(prefix_matching) FROM induction '
        f"WHERE run = '{run}' GROUP BY step ORDER BY step\")  # DuckDB"
    )


def _formed(heads: pd.DataFrame, field: str) -> pd.Series | None:
    """The best head's row at the first step at which `field` passes the threshold, or None."""
    best = heads.loc[heads.groupby("step")[field].idxmax()]
    beyond = best[best[field] > _FORMED]
    return None if beyond.empty else beyond.iloc[0]


def _head(heads: pd.DataFrame, field: str, meaning: str) -> str:
    final = heads[heads["step"] == heads["step"].max()]
    last = final.sort_values(field).iloc[-1]
    end = f"{last[field]:.2f} ± {half_width(last, field):.2f} at step {last['step']}"
    null = f"uniform attention would give {last[f'{field}_null']:.2f}"
    name = f"{field.replace('_', '-')} score"
    formed = _formed(heads, field)
    if formed is None:
        return f"No head's {name} passed {_FORMED}: the best came to {end} ({null})."
    return (
        f"Head {formed['layer']}.{formed['head']} {meaning}: its {name} was the first to pass "
        f"{_FORMED}, at step {formed['step']}; the best head came to {end} ({null})."
    )


def _cause(root: Path, run: str) -> str:
    """What ablating the induction heads showed when that was last tried."""
    untested = "That these heads cause anything was not tested: there was no time to ablate them."
    if not list(root.glob(f"ablation/run={run}/*.parquet")):
        return untested
    tables = [monitor.read(root, name, run=run) for name in ("circuit", "ablation")]
    circuit, ablation = (table[table["validity"] == "ok"] for table in tables)
    tested = circuit[circuit["causal_test"] != "not made"]
    if tested.empty:
        return untested
    step = tested["step"].max()
    claim = tested["claim"][tested["step"] == step].iloc[0]
    rows = ablation[(ablation["step"] == step) & (ablation["method"] == "mean")]
    group = rows[rows["group"] == "induction"].iloc[0]
    random = rows[rows["group"].str.startswith("random")]
    random = random[random["heads"].str.split().str.len() == len(group["heads"].split())]
    effects = (
        f"Without {group['heads'].replace(' ', ' and ')} (its output set to its mean) the loss on "
        f"later copies of random tokens rises by {group['repeat_later']:.2f} ± "
        f"{half_width(group, 'repeat_later'):.2f} nats, without any of {len(random)} other groups "
        f"of as many heads by {random['repeat_later'].max():.2f} at most, at step {step}."
    )
    if claim != INDUCTION_CIRCUIT:
        return f"{effects} That is no proof of an induction circuit: the claim is only {claim}."
    first = circuit["step"][circuit["claim"] == INDUCTION_CIRCUIT].min()
    return f"{effects} This is an induction circuit, shown first at step {first}."


def _noticed(root: Path, run: str) -> list[str]:
    """What was said of transitions while the model trained."""
    if not list(root.glob(f"transitions/run={run}/*.parquet")):
        return []
    said = monitor.read(root, "transitions", run=run)
    confirmed = said[said["state"] == "confirmed"]
    retracted = (said["state"] == "retracted").sum()
    told = [
        f"{row['series']}{' ' + row['direction'] if row['kind'] == 'change' else ''} (seen at step "
        f"{row['detected_at']:.0f}, confirmed at {row['step']})"
        for row in confirmed.to_dict("records")
    ]
    were = "were" if retracted > 1 else "was"
    taken_back = f"; {retracted} that had been said to begin {were} taken back" if retracted else ""
    if not told:
        return []
    return [f"Said while it trained: {', '.join(told)}{taken_back}."]


def _directions(root: Path, run: str) -> list[str]:
    """How well concepts can be read off along their directions, and since when these settled."""
    concepts = followed(monitor.read(root, "concepts", run=run))
    settled = followed(monitor.settling(root, run))
    read: list[str] = []
    by_chance: list[str] = []
    since: list[str] = []
    for name in CONCEPTS:
        rows = concepts[(concepts["concept"] == name) & (concepts["validity"] == "ok")]
        if rows.empty:
            continue
        first, last = rows.iloc[0], rows.iloc[-1]
        beyond = last["auc"] - half_width(last, "auc") > last["auc_null"]
        (read if beyond else by_chance).append(
            f"{called(name)} {last['auc']:.2f} ± {half_width(last, 'auc'):.2f} "
            f"({first['auc']:.2f} at step {first['step']})"
        )
        own = settled[settled["concept"] == name]
        turned = own["step"][own["cosine"] < own["cosine_null"]]
        there = own["step"][own["step"] > turned.max()] if len(turned) else own["step"]
        # The last direction lies as it does itself, which says nothing.
        if beyond and len(there) > 1:
            since.append(f"{called(name)} since step {there.iloc[0]}")
    told = []
    if read:
        told.append(
            f"After block {LAYER} concepts of Python can be read off, along one direction each, on "
            f"sequences on which nothing was fitted (AUC; 0.50 by chance): {', '.join(read)}."
        )
    if by_chance:
        told.append(f"Not to be told from chance: {', '.join(by_chance)}.")
    if since:
        told.append(
            "As far as noise lets one tell, their directions lie as they do at the end: "
            f"{', '.join(since)}."
        )
    return told


def _score(in_context: pd.DataFrame) -> str:
    last = in_context.iloc[-1]
    error = in_context.apply(half_width, axis=1, field="paired_score")
    unclear = in_context["step"][in_context["paired_score"] + error >= 0]
    steps = in_context["step"]
    below = steps[steps > unclear.max()] if len(unclear) else steps
    when = "is not yet clearly below 0"
    if len(below):
        when = f"is clearly below 0 since step {below.iloc[0]}"
    return (
        f"The in-context score on paired targets {when} and came to {last['paired_score']:.2f} ± "
        f"{half_width(last, 'paired_score'):.2f} nats (0 without use of the context)."
    )
