"""The linear map between two tensors of a pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monitor.anatomy import LanguageModel
from monitor.parts.recording import NotFoundError, Seen, error
from monitor.parts.weights import Linear, Matrix, Probed


def as_linear(model: LanguageModel, given: Seen, output: Seen) -> Linear:
    """The linear map that makes `output` of `given`.

    Raises `NotFoundError` where there is none whose weights can be read.
    """
    candidates: list[Linear] = []
    if output.linear is not None and (matrix := Matrix.of(model.module, output.linear)) is not None:
        candidates.append(matrix)
    if output.tap.path:
        module = model.module.get_submodule(output.tap.path)
        candidates.append(Probed(module=module, features=given.rows.shape[-1]))
    for linear in candidates:
        try:
            weight, bias = linear.read()
            made = F.linear(given.rows, weight, bias)
        except Exception:  # noqa: S112 -- a module that is no such map may fail in any way
            continue
        if error(made, output.rows) < torch.finfo(made.dtype).eps ** -0.5:
            return linear
    raise NotFoundError(f"what {output.tap.path} computes is no linear map that can be read")
