"""What each head does, by looking its numbers up one at a time, with SciPy's distributions."""

from __future__ import annotations

from scipy.stats import norm, t

ATTENTION = {
    "prefix_matching": "induction",
    "previous_token": "previous-token",
    "duplicate_token": "duplicate-token",
    "first_token": "sink",
    "same_offset": "positional",
}


def cell(columns, column, row):
    values = columns[column]
    value = None if values is None else values[row]
    return None if value is None else float(value)


def row_of(columns, **where):
    for row in range(len(columns["validity"])):
        if columns["validity"][row] == "ok" and all(
            columns[name][row] == value for name, value in where.items()
        ):
            return row
    return None


def distance(sigmas, n):
    return t.isf(norm.sf(sigmas), n - 1)


def label_and_claim(tables, layer, head):
    """The label and the claim of a head, from the columns of all tables."""
    label = label_of(tables, layer, head)
    if label == "none":
        return label, "none"
    if label == "copy-suppressing":
        return label, "attribution"
    if label == "induction":
        written = writes(tables, layer, head, sign=1)
    elif label == "previous-token":
        written = composes(tables, layer, head)
    else:
        return label, "pattern"
    if not written:
        return label, "pattern"
    return label, "causal" if ablating_hurts(tables, label, layer, head) else "attribution"


def label_of(tables, layer, head):
    induction = tables["induction"]
    row = row_of(induction, layer=layer, head=head)
    excesses = {}
    for score, label in ATTENTION.items():
        value, stderr, null = (
            cell(induction, f"{score}{part}", row) for part in ("", "_stderr", "_null")
        )
        excess, error = (value - null) / (1 - null), stderr / (1 - null)
        if excess >= 0.1 and excess > distance(3, induction["n"][row]) * error:
            excesses[label] = excess
    attends_to_copies = "induction" in excesses or "duplicate-token" in excesses
    if attends_to_copies and writes(tables, layer, head, sign=-1):
        return "copy-suppressing"
    if cell(induction, "previous_token", row) > 0.5:
        excesses.pop("positional", None)
    return max(excesses, key=excesses.get) if excesses else "none"


def writes(tables, layer, head, sign):
    copying, attribution = tables["copying"], tables["attribution"]
    row = row_of(copying, layer=layer, head=head)
    at = row_of(attribution, component="head", layer=layer, head=head)
    if row is None or at is None:
        return False
    score = sign * (
        cell(copying, "eigenvalue_score", row) - cell(copying, "eigenvalue_score_null", row)
    )
    contrast, stderr = sign * attribution["contrast"][at], attribution["contrast_stderr"][at]
    return (
        score > 3 * cell(copying, "eigenvalue_score_null_sd", row)
        and contrast > distance(2, attribution["n"][at]) * stderr
    )


def composes(tables, layer, head):
    edges = tables["composition"]
    for row in range(len(edges["validity"])):
        source = edges["source_layer"][row], edges["source_head"][row]
        target = edges["target_layer"][row], edges["target_head"][row]
        if source == (layer, head) and edges["kind"][row] == "k":
            above = edges["ratio"][row] - edges["ratio_null"][row]
            inducing = label_of(tables, *target) == "induction"
            if inducing and above > 3 * edges["ratio_null_sd"][row]:
                return True
    return False


def ablating_hurts(tables, label, layer, head):
    if "ablation" not in tables:
        return False
    ablation, tested = tables["ablation"], {"induction": "induction"}.get(label, "previous_token")
    for heads in set(ablation["heads"]):
        if f"{layer}.{head}" not in heads.split():
            continue
        passed = set()
        for row in range(len(ablation["validity"])):
            effect = float(ablation["over_random"][row])
            error = float(ablation["over_random_stderr"][row])
            if (
                ablation["heads"][row] == heads
                and ablation["group"][row] == tested
                and effect > distance(2, ablation["n"][row]) * error
            ):
                passed.add(ablation["method"][row])
        if passed >= {"zero", "mean"}:
            return True
    return False
