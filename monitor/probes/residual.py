"""The residual stream: how large it is, how many dimensions it uses, and how much it has changed.

For `n` sampled tokens with the centred covariance's eigenvalues λ: the participation ratio
(Σλ)²/Σλ², the effective rank exp(−Σ p log p) with p = λ/Σλ (Roy & Vetterli 2007) and the share of
the top component λ₁/Σλ. All of them are biased by the number of tokens: isotropic noise in 64
dimensions has a participation ratio of 31 in 64 tokens. Their null is such noise, in as many tokens
and dimensions, so that only what lies beside it says something of the model.

Anisotropy is the mean cosine between tokens of different sequences (Ethayarajh 2019). Similarity to
earlier measurements is linear CKA (Kornblith et al. 2019) from the unbiased estimate of HSIC (Song
et al. 2012; Nguyen et al. 2021), which rotations of the stream leave at 1 and which is 0 on average
between what is unrelated. The final share of a block is <x_l+1 − x_l, x_L>/‖x_L‖²: all of them,
and what enters the first block, sum to 1.

Everything but the norm and the shares comes from inner products of the sampled tokens with each
other, and the errors from leaving sequences out.

Shapes: `layer` what enters the first block and then what each returns; `sampled` positions of each
of `batch` sequences; `token` both together; `subset` all tokens, or those that remain as sequences
are left out; `side` of a square matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from monitor.capture import Observation
from monitor.estimate import jackknife_stderr, left_in, pooled_mean
from monitor.evidence import Evidence, unseen
from monitor.record import STREAM_LAYER, Field, ProbeSpec

# The cost of eigenvalues grows with the cube of the number of tokens.
_MOST_TOKENS = 512

# Mean of the Tracy-Widom law of real matrices: how far the largest eigenvalue of noise is from the
# edge of the others, in its own unit.
_TRACY_WIDOM = -1.2065

_ISOTROPIC = "isotropic Gaussian noise in as many tokens and dimensions"
_FEW_TOKENS = "Few tokens: it is bounded by their number, so compare it with its null."
_UNRELATED = "0: unrelated to it, as with the tokens permuted"
_SIMILAR = "Embeddings of the same tokens are alike from the start; a few large dimensions decide."

SPEC = ProbeSpec(
    name="residual",
    help="Size, dimensionality and change of the residual stream, at 16 positions a sequence (at "
    "most 512 tokens in all), of held-out text or else of repeated random tokens.",
    source="Roy & Vetterli 2007; Ethayarajh 2019; Kornblith et al. 2019; Nguyen et al. 2021",
    dims=(STREAM_LAYER,),
    fields=(
        Field(
            name="norm",
            help="Mean L2 norm of a token's residual stream.",
            low=0,
            null="what enters the first block: the norm if no block wrote anything",
            fooled_by="The final norm takes it out: it may grow without any effect on the logits.",
        ),
        Field(
            name="participation_ratio",
            help="Number of dimensions that the variance is spread over: (Σλ)²/Σλ².",
            low=1,
            null=_ISOTROPIC,
            fooled_by=_FEW_TOKENS + " A few outlier tokens lower it.",
        ),
        Field(
            name="effective_rank",
            help="Number of dimensions that the variance is spread over: exp of the spectrum's "
            "entropy.",
            low=1,
            null=_ISOTROPIC,
            fooled_by=_FEW_TOKENS + " Faint noise in many dimensions raises it.",
        ),
        Field(
            name="top_share",
            help="Share of the variance in the top principal component.",
            low=0,
            high=1,
            null=_ISOTROPIC,
            fooled_by="A single outlier token or dimension can hold most of the variance.",
        ),
        Field(
            name="anisotropy",
            help="Mean cosine between tokens of different sequences.",
            low=-1,
            high=1,
            null="0: directions are uniform",
            fooled_by="One large dimension that all tokens share, a bias say, is enough.",
        ),
        Field(
            name="cka_previous",
            help="Linear CKA with the previous measurement of this attempt; 1: equal but for "
            "rotation and scale. Missing at the first.",
            low=-1,
            high=1,
            null=_UNRELATED,
            fooled_by=_SIMILAR + " It depends on the steps between the two.",
        ),
        Field(
            name="cka_first",
            help="Linear CKA with the first measurement of this attempt: after resuming, the first "
            "since then. Missing at the first.",
            low=-1,
            high=1,
            null=_UNRELATED,
            fooled_by=_SIMILAR,
        ),
        Field(
            name="final_share",
            help="Share of the final residual stream that this block's change makes up, along its "
            "direction (layer -1: what enters the first block); they sum to 1.",
            null="1 over the number of shares: all contribute alike",
            fooled_by="Blocks that cancel each other have large shares of opposite signs.",
        ),
    ),
    needs=(("text", "stream"), ("repeated", "stream")),
)

_SPECTRAL = ("participation_ratio", "effective_rank", "top_share")


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for what enters the first block and one a block, from the stream on `text` or, where
    there is none, on `repeated`.
    """
    name = "text" if "text" in evidence.observations else "repeated"
    observation = evidence.observations[name]
    rows = _rows(observation)
    if rows is None:
        why = observation.reasons.get("stream", "the residual stream was not seen")
        return unseen(SPEC, why, n=len(observation.stimulus.tokens))
    layers, batch, _, _ = rows.shape
    earlier = {
        "cka_previous": _comparable(evidence.previous.get(name), rows),
        "cka_first": _comparable(evidence.first.get(name), rows),
    }
    return {
        **_norms(rows),
        **_final_shares(rows),
        **_anisotropies(rows),
        **_shapes(rows, earlier),
        "layer": list(range(-1, layers - 1)),
        "n": [batch] * layers,
        "validity": ["ok"] * layers,
    }


def _rows(observation: Observation | None) -> Float[Tensor, "layer batch sampled feature"] | None:
    """At most `_MOST_TOKENS` tokens of the stream, spread evenly."""
    if observation is None or observation.stream is None:
        return None
    rows = observation.stream.rows
    _, batch, sampled, _ = rows.shape
    sequences = _spread(batch, _MOST_TOKENS)
    return rows[:, sequences][:, :, _spread(sampled, _MOST_TOKENS // len(sequences))]


def _spread(count: int, most: int) -> Tensor:
    # The last one is in.
    kept = min(count, most)
    return torch.arange(1, kept + 1) * count // kept - 1


def _comparable(
    earlier: Observation | None, rows: Float[Tensor, "layer batch sampled feature"]
) -> Float[Tensor, "layer batch sampled earlier"] | None:
    """What was seen of the same tokens at an earlier measurement, by a model of as many layers."""
    seen = _rows(earlier)
    return seen if seen is not None and seen.shape[:-1] == rows.shape[:-1] else None


def _norms(rows: Float[Tensor, "layer batch sampled feature"]) -> dict[str, Any]:
    norms = rows.double().norm(dim=-1)
    columns = _pooled("norm", norms)
    return columns | {"norm_null": columns["norm"][:1].expand(len(rows))}


def _final_shares(rows: Float[Tensor, "layer batch sampled feature"]) -> dict[str, Any]:
    final = rows[-1].double()
    # One layer at a time: all of them in float64 would double what is held.
    along = torch.stack([(layer.double() * final).sum(-1) for layer in rows])
    share = along.diff(dim=0, prepend=torch.zeros_like(along[:1])) / final.square().sum(-1)
    null = torch.full((len(rows),), 1 / len(rows))
    return _pooled("final_share", share) | {"final_share_null": null}


def _pooled(field: str, values: Float[Tensor, "layer batch sampled"]) -> dict[str, Any]:
    _, batch, sampled = values.shape
    totals = reduce(values, "layer batch sampled -> batch layer", "sum")
    mean, stderr = pooled_mean(totals, torch.full((batch,), sampled))
    return {field: mean, f"{field}_stderr": stderr}


def _anisotropies(rows: Float[Tensor, "layer batch sampled feature"]) -> dict[str, Any]:
    layers, batch, _, _ = rows.shape
    null = torch.zeros(layers)
    if batch < 2:
        return {"anisotropy": None, "anisotropy_stderr": None, "anisotropy_null": null}
    # The mean cosine of two sequences' tokens is the product of their mean directions.
    directions = torch.stack(
        [(layer / layer.norm(dim=-1, keepdim=True)).mean(1) for layer in rows.double()]
    )
    cosines = directions @ directions.mT
    without = torch.stack([_mean_beside_diagonal(cosines[:, k][:, :, k]) for k in left_in(batch)])
    return {
        "anisotropy": _mean_beside_diagonal(cosines),
        "anisotropy_stderr": jackknife_stderr(without),
        "anisotropy_null": null,
    }


def _mean_beside_diagonal(
    pairs: Float[Tensor, "layer batch batch"],
) -> Float[Tensor, " layer"]:
    batch = pairs.shape[-1]
    diagonal = pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    # 0 / 0 where one sequence remains: there is no pair.
    return (pairs.sum((-2, -1)) - diagonal) / pairs.new_tensor(batch * (batch - 1))


def _shapes(
    rows: Float[Tensor, "layer batch sampled feature"],
    earlier: dict[str, Float[Tensor, "layer batch sampled earlier"] | None],
) -> dict[str, Any]:
    """The fields of the spectrum, and similarity to the earlier measurements that there are."""
    layers, batch, sampled, features = rows.shape
    seen = {field: streams for field, streams in earlier.items() if streams is not None}
    everyone = torch.ones(1, batch, dtype=torch.bool)
    subsets = torch.cat([everyone, left_in(batch)]).repeat_interleave(sampled, dim=1)
    values, errors = [], []
    for layer, streams in enumerate(rows):
        tokens = centred(streams)
        gram = tokens @ tokens.T
        others = [centred(other[layer]) for other in seen.values()]
        similar = [cka(gram, other @ other.T, subsets) for other in others]
        estimates = torch.stack([*spectral(tokens, gram, subsets).unbind(1), *similar], dim=1)
        values.append(estimates[0])
        errors.append(jackknife_stderr(estimates[1:]))
    value, stderr = torch.stack(values), torch.stack(errors)
    columns: dict[str, Any] = {}
    for place, field in enumerate((*_SPECTRAL, *seen)):
        columns |= {field: value[:, place], f"{field}_stderr": stderr[:, place]}
    for field, null in zip(_SPECTRAL, isotropic(batch * sampled, features), strict=True):
        columns[f"{field}_null"] = torch.full((layers,), null)
    for field in earlier:
        columns.setdefault(field, None)
        columns.setdefault(f"{field}_stderr", None)
        columns[f"{field}_null"] = torch.zeros(layers) if field in seen else None
    return columns


def centred(streams: Float[Tensor, "batch sampled feature"]) -> Float[Tensor, "token feature"]:
    """The tokens' differences from their mean, in float64.

    A mean that is large beside the variance then costs no digits in inner products.
    """
    tokens = rearrange(streams.double(), "batch sampled feature -> (batch sampled) feature")
    return tokens - tokens.mean(0)


def spectral(
    tokens: Float[Tensor, "token feature"],
    gram: Float[Tensor, "token token"],
    subsets: Bool[Tensor, "subset token"],
) -> Float[Tensor, "subset estimated"]:
    """Participation ratio, effective rank and share of the top component, of subsets of the tokens,
    whose inner products are `gram`. NaN where the tokens are all equal, or not finite.

    >>> tokens = torch.eye(5)
    >>> spectral(tokens, tokens @ tokens.T, torch.ones(1, 5, dtype=torch.bool))
    tensor([[4.0000, 4.0000, 0.2500]])
    """
    return torch.stack([_spectral(_moments(tokens, gram, subset)) for subset in subsets])


def _moments(
    tokens: Float[Tensor, "token feature"],
    gram: Float[Tensor, "token token"],
    subset: Bool[Tensor, " token"],
) -> Float[Tensor, "side side"]:
    """The smaller of the two matrices that have the eigenvalues of the subset's covariance."""
    if tokens.shape[1] < len(tokens):
        some = tokens[subset]
        some = some - some.mean(0)
        return some.T @ some
    inner = gram[subset][:, subset]
    return inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()


def _spectral(moments: Float[Tensor, "side side"]) -> Float[Tensor, " estimated"]:
    if not (moments.numel() and moments.isfinite().all()):
        return moments.new_full((3,), math.nan)
    variances = torch.linalg.eigvalsh(moments).clamp_min(0)
    shares = variances / variances.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    return torch.stack([1 / shares.square().sum(), entropy.exp(), shares[-1]])


def cka(
    gram: Float[Tensor, "token token"],
    other: Float[Tensor, "token token"],
    subsets: Bool[Tensor, "subset token"],
) -> Float[Tensor, " subset"]:
    """Linear CKA of tokens that were seen twice, from the inner products between them: their
    unbiased HSIC over the root of that of each with itself, for subsets of the tokens.
    """
    here, there = (matrix.clone().fill_diagonal_(0) for matrix in (gram, other))
    alone = _hsic(here, here, subsets) * _hsic(there, there, subsets)
    return _hsic(here, there, subsets) / alone.sqrt()


def _hsic(
    here: Float[Tensor, "token token"],
    there: Float[Tensor, "token token"],
    subsets: Bool[Tensor, "subset token"],
) -> Float[Tensor, " subset"]:
    """Unbiased HSIC (Song et al. 2012, equation 5) but for the factor that CKA does not see.

    The matrices' diagonals are zero: no token is compared with itself.
    """
    inside = subsets.to(here.dtype).T
    count = inside.sum(0)
    from_here, from_there = here @ inside * inside, there @ inside * inside
    both = ((here * there) @ inside * inside).sum(0)
    means = from_here.sum(0) * from_there.sum(0) / ((count - 1) * (count - 2))
    return both + means - 2 * (from_here * from_there).sum(0) / (count - 2)


def isotropic(tokens: int, features: int) -> tuple[float, float, float]:
    """What `spectral` says on average of as many tokens of isotropic Gaussian noise.

    The participation ratio is the ratio of the expected moments of a Wishart matrix, the effective
    rank that of Page's (1993) mean entropy, the top share the mean of the largest eigenvalue
    (Johnstone 2001, with the halves of Ma 2012): all within 2% from 30 tokens and 8 dimensions.

    >>> [round(value, 3) for value in isotropic(64, 64)]
    [31.516, 38.511, 0.059]
    """
    # The mean takes one token.
    m, d = tokens - 1, features
    small, large = sorted((m, d))
    side_m, side_d = math.sqrt(m - 0.5), math.sqrt(d - 0.5)
    width = (side_m + side_d) * (1 / side_m + 1 / side_d) ** (1 / 3)
    largest = (side_m + side_d) ** 2 + _TRACY_WIDOM * width
    return (
        (m * d + 2) / (m + d + 1),
        small * math.exp(-small / (2 * large)),
        min(1.0, largest / (m * d)),
    )
