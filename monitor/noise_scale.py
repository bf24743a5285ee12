"""The gradient noise scale: how many batches it takes for their mean gradient to be as much signal
as noise (McCandlish et al. 2018, An Empirical Model of Large-Batch Training, the "simple" one).

It is tr Σ / ‖G‖², of the gradient G of the loss and the covariance Σ of that of one micro-batch.
Where an update is made of several micro-batches, their gradients pass one by one on the way to
being added up, and are looked at there: nothing is computed again, and no gradient is copied. With
K of them, g₁ … g_K,

    ‖G‖² ≈ mean over i ≠ j of gᵢ·gⱼ,    tr Σ ≈ mean of ‖gᵢ‖² minus that,

both without bias; their ratio is not, and its error is that of the jackknife over micro-batches.

Gradients of consecutive updates are no micro-batches, however small the learning rate η is: an
update goes against the noise of its own gradient, so that on average the next one's product with it
is ‖G‖² − η (GᵀHG + tr HΣ) for gradient descent with curvatures H. Where descent has settled, ‖G‖²
is η tr HΣ / 2, and this is minus that.

What is kept of a gradient are its sums with random signs over `_PROJECTIONS` places, whose products
are on average those of gradients (Charikar et al. 2002): of ‖G‖² and of tr Σ, √(2 / places), about
1%, is by chance. A micro-batch takes 64 kB, whatever the size of the model.

Shapes: `batch` micro-batches; `projection` the sums that are kept of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from monitor.estimate import jackknife_stderr

# A prime, so that what is alike at regular distances, a column of a matrix, is not added up.
_PROJECTIONS = 16_381

# So many rows have signs of their own, and then they begin again with another sign for all.
_ROWS = 32

# ‖G‖² is told from 0 where this share of Student's t lies below.
_CERTAIN = 0.99865

ONE_BATCH = "an update has one gradient here: accumulate those of 3 or more batches"
TOO_FEW = "two batches an update: the error can be told of 3 or more"
UNEVEN = "not all parameters had a gradient in every batch of the update"
NO_SIGNAL = "the gradient cannot be told from 0 among so few batches"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    """What the micro-batches of one update tell, with standard errors; None: nothing.

    Attributes:
        signal: ‖G‖² of the gradient that they add up to, without bias: it can be below 0.
        variance: tr Σ of a micro-batch, as large as if the update were made of it alone.
        scale: their ratio, in micro-batches.
        why: `ok`, or why there is no scale.
    """

    signal: float | None = None
    signal_stderr: float | None = None
    variance: float | None = None
    variance_stderr: float | None = None
    scale: float | None = None
    scale_stderr: float | None = None
    why: str = ONE_BATCH


def noise_scale(gradients: Float[Tensor, "batch projection"]) -> NoiseScale:
    """What the gradients of micro-batches of one size, or sketches of them, tell.

    >>> import torch
    >>> random = torch.Generator().manual_seed(0)
    >>> gradients = 1 + 3 * torch.randn(64, 1_000, generator=random)
    >>> found = noise_scale(gradients)
    >>> abs(found.scale - 9) < 3 * found.scale_stderr
    True
    """
    count = len(gradients)
    if count < 2:
        return NoiseScale()
    if not gradients.isfinite().all():
        return NoiseScale(why="its gradients are not finite")
    wide = gradients.double()
    signal, variance = _estimates(wide.sum(0)[None], wide.square().sum()[None], count)
    # As the optimiser has it: the sum of all.
    units = count**2
    found: dict[str, Any] = {
        "signal": units * signal.item(),
        "variance": units * variance.item(),
    }
    if count < 3:
        return NoiseScale(**found, why=TOO_FEW)
    squares = wide.square().sum(1)
    signals, variances = _estimates(wide.sum(0) - wide, squares.sum() - squares, count - 1)
    error = jackknife_stderr(signals).item()
    found["signal_stderr"] = units * error
    found["variance_stderr"] = units * jackknife_stderr(variances).item()
    if not signal.item() > stdtrit(count - 1, _CERTAIN) * error:
        return NoiseScale(**found, why=NO_SIGNAL)
    scale = (variance / signal).item()
    by_chance = scale * math.sqrt(4 / gradients.shape[1])
    stderr = math.hypot(jackknife_stderr(variances / signals).item(), by_chance)
    return NoiseScale(**found, scale=scale, scale_stderr=stderr, why="ok")


def _estimates(
    totals: Float[Tensor, "estimate projection"], squares: Float[Tensor, " estimate"], count: int
) -> tuple[Float[Tensor, " estimate"], Float[Tensor, " estimate"]]:
    """‖G‖² and tr Σ of one micro-batch, from the sum of `count` gradients and of their squares."""
    signal = (totals.square().sum(1) - squares) / (count * max(1, count - 1))
    return signal, squares / count - signal


class MicroBatches:
    """Looks at the gradients of parameters as they come, between `begin` and `end`.

    Neither gradients nor parameters are touched: the hooks are on what adds gradients up, and see
    them before they are scaled, clipped or averaged over processes. `seconds` sums what that took.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> seen = MicroBatches()
    >>> seen.begin([weight])
    >>> for batch in (2.0, 3.0, 2.0, 3.0, 2.0, 3.0):
    ...     (batch * weight).sum().backward()
    >>> found = seen.end()
    >>> round(found.signal, 2), round(found.variance, 2), round(found.scale, 3)
    (446.4, 21.6, 0.048)
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._kept: list[Float[Tensor, " projection"]] = []
        self._counts: dict[int, int] = {}
        self._failed = ""
        self.seconds = 0.0

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """From now on the gradients of these are looked at."""
        self.end()
        for place, parameter in enumerate(parameters):
            if parameter.requires_grad:
                node = torch.autograd.graph.get_gradient_edge(parameter).node
                # Only while the node is held does its hook stay.
                self._hooks.append((node, node.register_prehook(self._seeing(place))))

    def end(self) -> NoiseScale:
        """What was seen since `begin`; nothing is looked at any more."""
        for _, hook in self._hooks:
            hook.remove()
        kept, counts, failed = self._kept, self._counts, self._failed
        self._hooks, self._kept, self._counts, self._failed = [], [], {}, ""
        if failed:
            return NoiseScale(why=failed)
        if len(set(counts.values())) > 1:
            return NoiseScale(why=UNEVEN)
        return noise_scale(torch.stack(kept)) if kept else NoiseScale()

    def _seeing(self, place: int) -> Any:
        def see(gradients: tuple[Tensor | None, ...]) -> None:
            (gradient,) = gradients
            if gradient is None or self._failed:
                return
            begun = time.perf_counter()
            try:
                self._add(place, gradient)
            except Exception as error:
                self._failed = f"{type(error).__name__}: {error}"
            self.seconds += time.perf_counter() - begun

        return see

    @torch.no_grad()
    def _add(self, place: int, gradient: Tensor) -> None:
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        batch = self._counts[place] = self._counts.get(place, 0) + 1
        if batch > len(self._kept):
            self._kept.append(project(gradient, seed=place))
            return
        kept = self._kept[batch - 1]
        if kept.device == gradient.device:
            project(gradient, seed=place, to=kept)
        else:
            kept += project(gradient, seed=place).to(kept.device)


def project(
    gradient: Tensor, *, seed: int, to: Float[Tensor, " projection"] | None = None
) -> Float[Tensor, " projection"]:
    """Adds up a tensor's numbers with random signs, the same for the same seed and shape: `to` what
    is there, or to zeros.
    """
    flat = gradient.detach().flatten()
    sums = torch.zeros(_PROJECTIONS, device=flat.device) if to is None else to
    random, block = torch.Generator().manual_seed(seed), _ROWS * _PROJECTIONS
    start = int(torch.randint(_PROJECTIONS, (), generator=random))
    signs = torch.randint(2, (-(-len(flat) // block),), generator=random).tolist()
    within = _within(flat.device)
    for sign, some in zip(signs, flat.split(block), strict=True):
        part = some.to(sums.dtype)
        whole, rest = divmod(len(part), _PROJECTIONS)
        rows = part[: whole * _PROJECTIONS].view(whole, _PROJECTIONS)
        pieces = [(rows * within[:whole]).sum(0)] if whole else []
        pieces += [part[-rest:] * within[whole, :rest]] if rest else []
        for piece in pieces:
            before = piece[: _PROJECTIONS - start]
            sums[start : start + len(before)].add_(before, alpha=2 * sign - 1)
            after = piece[len(before) :]
            sums[: len(after)].add_(after, alpha=2 * sign - 1)
    return sums


@cache
def _within(device: torch.device) -> Float[Tensor, "row projection"]:
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_ROWS, _PROJECTIONS), generator=random)
    return (signs.float() * 2 - 1).to(device)
