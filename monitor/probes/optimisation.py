"""Optimisation: what training itself shows, of the model and of each family of its parameters.

Gradients, updates and the loss are those of the latest step, read while it was made; they are facts
of that step and no estimates, and have no standard error, but for the gradient noise scale. The
stable rank of a matrix is ‖W‖_F² / ‖W‖₂² (Rudelson & Vershynin 2007), between 1 and its rank. That
of a Gaussian one of the same shape follows from its largest singular value, whose square has the
Tracy-Widom law (Johnstone 2001): a matrix far below has a direction that stands out of the noise.

The largest singular value is found in a block Krylov space (Musco & Musco 2015) of 8 × 8 columns,
from below: in random matrices, where it is hardest, stable ranks are too large by less than 1%.

The gradient noise scale is that of `monitor.noise_scale`, from the micro-batches of the step.

What fools it: one step is one batch, and its loss and gradient scatter as batches do. Norms of
weights before a norm layer do not matter to what the model says, and then nor do updates, other
than beside them.

Shapes: matrices of `row` by `column`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from monitor.divided import ONLY_A_PART, is_whole
from monitor.evidence import Evidence, unseen
from monitor.optimising import UNWATCHED, Training, Update
from monitor.parts import Parts
from monitor.parts.weights import Linear, Matrix
from monitor.record import Dim, Field, ProbeSpec

_ONE_BATCH = "One step is one batch: it scatters as batches do."
_DESCENT = "learning rate × gradient: the update of plain gradient descent"


def _fact(name: str, help_text: str, fooled_by: str, *, unit: str = "", null: str = "") -> Field:
    """What a step did: no estimate, and so without a standard error."""
    return Field(
        name=name, help=help_text, unit=unit, low=0, null=null, fooled_by=fooled_by, stderr=False
    )


SPEC = ProbeSpec(
    name="optimisation",
    help="What training itself shows at the latest step; only where optimisers are watched. Of the "
    "first process, where several train together. n: tensors of parameters in the family.",
    source="Rudelson & Vershynin 2007, Sampling from large matrices; Johnstone 2001, On the "
    "distribution of the largest eigenvalue; McCandlish et al. 2018, An Empirical Model of "
    "Large-Batch Training",
    dims=(
        Dim(
            name="family",
            help="Parameters of the model: all, or embedding (one that is the unembedding as well "
            "included), attention, mlp, norm, unembedding, and other: whatever is known as none.",
            text=True,
        ),
    ),
    fields=(
        Field(
            name="loss",
            help="Training loss of the step, its micro-batches together; of all.",
            stderr=False,
            fooled_by=f"{_ONE_BATCH} It is what is trained on, whatever was added to it.",
        ),
        _fact(
            "learning_rate",
            "That of the update: mean over parameters, each with that of its group.",
            "What it means depends on the optimiser.",
        ),
        _fact(
            "gradient_norm",
            "L2 norm of the gradient as the optimiser had it: accumulated, unscaled and clipped.",
            f"{_ONE_BATCH} Clipped it is never above the limit. An optimiser that works within "
            "its gradients leaves them changed.",
        ),
        _fact("weight_norm", "L2 norm of the weights.", "A norm layer after them takes it out."),
        _fact(
            "update_norm",
            "L2 norm of how far the step moved the weights.",
            _ONE_BATCH,
            null=_DESCENT,
        ),
        _fact(
            "update_ratio",
            "update_norm over weight_norm.",
            "Weights that begin at 0 move far beside that.",
            null=_DESCENT,
        ),
        Field(
            name="noise_scale",
            help="tr Σ/‖G‖², the gradient noise scale: of how many micro-batches the mean gradient "
            "is as much noise as signal; of all. It is told where a step adds up the gradients of "
            "3 or more, and ‖G‖² is above 0 by 3 standard deviations.",
            unit="batches",
            low=0,
            fooled_by="Micro-batches are taken to be of one size and drawn independently: two "
            "losses of one batch that go backward apart are not, nor are the parts of a data set "
            "that is one batch, of which the signal comes out below 0. Where it is barely told it "
            "is too small: average both parts of it over measurements, each apart. What the "
            "optimiser makes of gradients is no part of it.",
        ),
        Field(
            name="gradient_signal",
            help="‖G‖² without bias, of the sum of the gradients of a step as they came (neither "
            "unscaled nor clipped); of all. It can be below 0.",
            null="0: gradients of noise alone",
            fooled_by="As noise_scale. Of half precision it has the scale of the loss then.",
        ),
        Field(
            name="gradient_variance",
            help="tr Σ of one micro-batch, as if it were the whole step; of all.",
            low=0,
            fooled_by="As gradient_signal. Dropout is in it.",
        ),
        Field(
            name="noise_scale_why",
            help="ok, or why there is no noise_scale.",
            text=True,
            stderr=False,
        ),
        Field(
            name="stable_rank",
            help="‖W‖_F²/‖W‖₂², mean over the matrices that are not all zero.",
            low=1,
            null="Gaussian random matrices of the same shapes",
            null_sd=True,
            stderr=False,
            fooled_by="A mean that is not 0, as of an embedding, is one strong direction.",
        ),
        _fact(
            "steps_per_second",
            "Steps a second since the measurement before, the time that it took left out; of all.",
            "Validation and checkpoints count as well.",
        ),
        _fact(
            "tokens_per_second",
            "Training tokens a second since the measurement before, likewise; of all.",
            "Validation and checkpoints count as well.",
        ),
    ),
    needs=(),
    weights=True,
    training=True,
)

_FAMILIES = ("all", "embedding", "attention", "mlp", "norm", "unembedding", "other")
_SEED = 0
_BLOCK = 8
_POWERS = 8
# Mean and standard deviation of the Tracy-Widom law of real matrices.
_TRACY_WIDOM = (-1.2065, 1.268)


def compute(evidence: Evidence) -> dict[str, Any]:
    """A row for all parameters, and one for each family that there is."""
    parts = evidence.known_parts()
    model, training = parts.model.module, evidence.training
    named = dict(model.named_parameters())
    if not is_whole(named.values()):
        return unseen(SPEC, ONLY_A_PART) | {"family": ["all"]}
    of = families(parts)
    weights = {name: float(_norm(parameter)) for name, parameter in named.items()}
    ranks = {name: rank for name, p in named.items() if (rank := _ranks(p, weights[name]))}
    rows = []
    for family in _FAMILIES:
        names = [name for name in named if family in ("all", of[name])]
        if names:
            row: dict[str, Any] = {column: None for f in SPEC.fields for column in f.columns}
            row |= _of_weights([weights[n] for n in names], [ranks[n] for n in names if n in ranks])
            row |= {"family": family, "n": len(names)}
            row |= _of_training(training, [named[name] for name in names], row["weight_norm"])
            if family == "all" and training is not None:
                told = ("loss", "steps_per_second", "tokens_per_second")
                row |= {name: getattr(training, name) for name in told}
                row |= _of_noise(training)
            rows.append(row)
    return {column: [row[column] for row in rows] for column in rows[0]}


def families(parts: Parts) -> dict[str, str]:
    """By the name of each parameter of a model, its family."""
    model, found = parts.model.module, dict[str, str]()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found |= dict.fromkeys(_parameters(path, module), "embedding")
        elif "norm" in type(module).__name__.lower():
            found |= dict.fromkeys(_parameters(path, module), "norm")
    for family, linear in _linears(parts):
        if isinstance(linear, Matrix):
            for view in (linear.weight, linear.bias):
                if view is not None:
                    found.setdefault(view.name, family)
    for path in _norms(parts):
        for name in _parameters(path, model.get_submodule(path)):
            found.setdefault(name, "norm")
    return {name: found.get(name, "other") for name, _ in model.named_parameters()}


def _parameters(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]


def _linears(parts: Parts) -> Iterator[tuple[str, Linear | None]]:
    yield "embedding", parts.embedding_map
    yield "unembedding", parts.unembedding_map
    for block in parts.blocks:
        for projection in (block.query, block.key, block.value, block.mixing):
            yield "attention", None if projection is None else projection.linear
        if block.neurons is not None:
            for linear in (block.neurons.up, block.neurons.gate, block.neurons.out):
                yield "mlp", linear


def _norms(parts: Parts) -> Iterator[str]:
    paths = [parts.final_norm, parts.embedding_norm]
    for block in parts.blocks:
        paths += [block.attention_norm, block.mlp_norm]
    yield from (path for path in paths if path is not None)


def _of_weights(
    norms: Sequence[float], ranks: Sequence[tuple[float, float, float]]
) -> Mapping[str, Any]:
    columns: dict[str, Any] = {"weight_norm": _together(norms)}
    if ranks:
        found, null, sd = zip(*ranks, strict=True)
        columns["stable_rank"] = sum(found) / len(ranks)
        columns["stable_rank_null"] = sum(null) / len(ranks)
        columns["stable_rank_null_sd"] = _together(sd) / len(ranks)
    return columns


def _of_training(
    training: Training | None, parameters: Sequence[Tensor], weight_norm: float
) -> Mapping[str, Any]:
    """What the latest update did to some parameters."""
    if training is None or not training.updates:
        return {"validity": UNWATCHED if training is None else training.why}
    read = [(p.numel(), training.updates[p]) for p in parameters if p in training.updates]
    if not read:
        return {"validity": "no optimiser that is watched updates its parameters"}
    gradients = [update for _, update in read if update.gradient is not None]
    moved = _together([update.change for _, update in read])
    descent = _together([update.learning_rate * _gradient(update) for update in gradients])
    known = bool(gradients) and math.isfinite(descent)
    rate = sum(size * u.learning_rate for size, u in read) / sum(size for size, _ in read)
    return {
        "learning_rate": None if math.isnan(rate) else rate,
        "gradient_norm": _together([_gradient(u) for u in gradients]) if gradients else None,
        "update_norm": moved,
        "update_norm_null": descent if known else None,
        "update_ratio": moved / weight_norm if weight_norm > 0 else None,
        "update_ratio_null": descent / weight_norm if known and weight_norm > 0 else None,
        "validity": "ok",
    }


def _of_noise(training: Training) -> Mapping[str, Any]:
    """What the micro-batches of the latest update tell."""
    if not training.updates:
        return {"noise_scale_why": training.why}
    noise = training.noise
    return {
        "noise_scale": noise.scale,
        "noise_scale_stderr": noise.scale_stderr,
        "gradient_signal": noise.signal,
        "gradient_signal_stderr": noise.signal_stderr,
        "gradient_signal_null": None if noise.signal is None else 0.0,
        "gradient_variance": noise.variance,
        "gradient_variance_stderr": noise.variance_stderr,
        "noise_scale_why": noise.why,
    }


def _gradient(update: Update) -> float:
    return 0.0 if update.gradient is None else update.gradient


def _together(norms: Sequence[float]) -> float:
    """The norm of several vectors as one."""
    return math.sqrt(sum(norm * norm for norm in norms))


def _norm(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(parameter.detach(), dtype=wide)
    return norm


def _ranks(parameter: Tensor, norm: float) -> tuple[float, float, float] | None:
    """A matrix's stable rank, and mean and standard deviation of that of random ones."""
    if parameter.ndim != 2 or not (0 < norm < math.inf):
        return None
    return (stable_rank(parameter), *random_stable_rank(*parameter.shape))


def stable_rank(matrix: Float[Tensor, "row column"]) -> float:
    """‖W‖_F² / ‖W‖₂², never below what it is, and above by little.

    >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))), 5)
    1.5
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    generator = torch.Generator().manual_seed(_SEED)
    width = min(_BLOCK, tall.shape[1])
    start = torch.randn(tall.shape[1], width, generator=generator).to(tall)
    # Of what is small the squares would be 0.
    size = torch.linalg.vector_norm(tall)
    block = torch.linalg.qr(start).Q
    blocks = [block]
    for _ in range(min(_POWERS, -(-tall.shape[1] // width)) - 1):
        block = torch.linalg.qr(tall.T @ (tall @ block / size) / size).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    seen = tall @ basis / size
    largest = torch.linalg.eigvalsh((seen.T @ seen).double())[-1]
    return 1.0 / min(1.0, float(largest))


def random_stable_rank(rows: int, columns: int) -> tuple[float, float]:
    """Mean and standard deviation of the stable rank of a Gaussian random matrix.

    Of `rows` and `columns` of some ten or more it holds to a few percent, and better for larger
    ones; a matrix of one row, or column, has 1.

    >>> mean, sd = random_stable_rank(100, 100)
    >>> round(mean, 1), round(sd, 1)
    (26.0, 0.9)
    """
    if min(rows, columns) == 1:
        return 1.0, 0.0
    a, b = math.sqrt(max(rows, columns) - 1), math.sqrt(min(rows, columns))
    centre, scale = (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)
    mean, sd = _TRACY_WIDOM
    largest = centre + mean * scale
    rank = rows * columns / largest
    # How large the whole matrix happens to be is no part of its rank, and independent of it.
    variance = (sd * scale / largest) ** 2 - 2 / (rows * columns)
    return rank, rank * math.sqrt(max(0.0, variance))
