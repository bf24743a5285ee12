"""What everything that reads the stream of a pass shares."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts import Parts
from monitor.parts.flow import Tap, rows


class UnseenError(Exception):
    """Why a kind of observation cannot be made of a model or on a stimulus."""


def rows_of(
    parts: Parts, tap: Tap, tensor: Tensor, tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position feature"]:
    """A tensor that passes, with one row a token.

    Raises `UnseenError` where it is not made so in this pass.
    """
    seen = rows(tensor, tokens, transposed=tap in parts.position_first)
    if seen is None:
        raise UnseenError(
            f"the {tap.kind} of {tap.path} has shape {list(tensor.shape)}: expected so many "
            f"numbers for each of {list(tokens.shape)} tokens"
        )
    return seen


def check_blocks(parts: Parts) -> None:
    """Raises `UnseenError` where the blocks are not known."""
    if not parts.blocks:
        raise UnseenError(f"blocks: {parts.reasons.get('blocks', 'not found')}")


def check_readable(parts: Parts) -> None:
    """Raises `UnseenError` where final norm or unembedding are not known."""
    for name in ("final_norm", "unembedding"):
        if name in parts.reasons:
            raise UnseenError(f"{name}: {parts.reasons[name]}")
