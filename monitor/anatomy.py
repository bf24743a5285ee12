"""Finding the language model inside a module, and how to call it.

Nothing here knows an architecture: a module is a language model when calling it on token ids gives
logits, and one short trial run shows what else must be known.

Shapes: `batch` sequences of `position` token ids, logits over the `vocabulary`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monitor.untouched import untouched

_TRIAL_POSITIONS = 16

# Names under which models and their configurations keep the number of positions they can read.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "block_size",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "context_length",
    "context",
)


class NotALanguageModelError(ValueError):
    """No single module that maps token ids to logits was found; the message says what was tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """A module that maps token ids to logits, and what must be known to measure it.

    `max_context` is None where the model does not say how many positions it can read, `bos` where
    it names no beginning-of-sequence token.
    """

    module: nn.Module
    vocab_size: int
    max_context: int | None
    bos: int | None

    @property
    def device(self) -> torch.device:
        """Where the model expects its tokens."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def parameter_count(self) -> int:
        """Number of parameters, each counted once."""
        return sum(p.numel() for p in self.module.parameters())

    def logits(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocabulary"]:
        """The model's logits; to be called inside `untouched`."""
        return _logits(self.module, tokens)


def find_language_model(root: nn.Module, *, vocab_size: int | None = None) -> LanguageModel:
    """The language model in `root`: `root` itself if it maps token ids to logits, else the one
    submodule that does. Wrappers of torch.compile and DistributedDataParallel are looked through.

    Raises `TypeError` where `root` is no module, `NotALanguageModelError` where none or several are
    found, and `ValueError` where `vocab_size` is larger than the model's own.
    """
    if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 2):
        raise ValueError(f"vocab_size={vocab_size!r}: expected a whole number of at least 2")
    if not isinstance(root, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module that maps token ids to logits; "
            f"got {type(root).__name__}"
        )
    found: dict[str, LanguageModel] = {}
    tried: list[str] = []
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop(0)
        inner = _unwrap(module)
        if any(model.module is inner for model in found.values()):
            continue
        try:
            found[path] = _read(inner, vocab_size)
            if path == "":
                break
        except _TrialError as error:
            tried.append(f"  {path or 'the module itself'} ({type(inner).__name__}): {error}")
            waiting += [
                (f"{path}.{name}".lstrip("."), child)
                for name, child in inner.named_children()
                if _embeds_tokens(child)
            ]
    if len(found) == 1:
        return next(iter(found.values()))
    expected = "expected one module that maps token ids [batch, position] to logits "
    expected += "[batch, position, vocabulary]"
    if found:
        raise NotALanguageModelError(
            f"{len(found)} language models found in {type(root).__name__}: {', '.join(found)}; "
            f"{expected}: pass the one you mean (TrainingDynamics: model='{next(iter(found))}')"
        )
    raise NotALanguageModelError(
        f"no language model found in {type(root).__name__}; {expected}. Tried:\n"
        + "\n".join(tried)
        + "\nPass the language model itself (TrainingDynamics: model='attribute.path')."
    )


def layer_numbers(paths: Sequence[str]) -> list[int]:
    """The layer of each attention call, from the paths of the calling modules in calling order.

    The index in the path (`transformer.h.3.attn` is layer 3) where those tell the calls apart, so
    that blocks without attention keep their place; else the calling order.
    """
    indices = [next((int(part) for part in p.split(".") if part.isdigit()), -1) for p in paths]
    rising = all(a < b for a, b in itertools.pairwise(indices))
    return indices if rising and -1 not in indices else list(range(len(paths)))


class _TrialError(Exception):
    """Why a module is not a language model."""


class _EmbeddingWatch(TorchFunctionMode):
    """Notes the sizes of the embeddings that are asked for the token ids and for the positions."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.token_rows: int | None = None
        self.position_rows: int | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (F.embedding, torch.embedding):
            ids, weight = args[:2] if func is F.embedding else args[1::-1]
            if ids.shape == self.tokens.shape and torch.equal(ids, self.tokens):
                self.token_rows = len(weight)
            elif ids.shape[-1:] == self.tokens.shape[-1:] and bool((ids.diff() == 1).all()):
                # Some tables begin with rows for padding: positions then start beyond them.
                self.position_rows = len(weight) - int(ids.min())
        return func(*args, **(kwargs or {}))


def _read(module: nn.Module, vocab_size: int | None) -> LanguageModel:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    # Every vocabulary has the ids 0 and 1; together they cannot be mistaken for positions.
    tokens = (torch.arange(2 * _TRIAL_POSITIONS, device=device) % 2).view(2, _TRIAL_POSITIONS)
    try:
        with untouched(module), _EmbeddingWatch(tokens) as watch:
            logits = _logits(module, tokens)
    except _TrialError:
        raise
    except Exception as error:
        raise _TrialError(f"{type(error).__name__}: {_first_line(error)}") from error
    width = logits.shape[-1]
    rows = watch.token_rows or width
    if width < rows:
        raise _TrialError(f"its output is {width} wide, less than its {rows} embedded token ids")
    config = getattr(module, "config", None)
    known = vocab_size or _integer(config, ("vocab_size",)) or rows
    if vocab_size is not None and vocab_size > rows:
        raise ValueError(
            f"vocab_size={vocab_size} is larger than the model's own vocabulary of {rows} "
            f"token ids: pass at most {rows}"
        )
    bos = _integer(config, ("bos_token_id",), least=0)
    contexts = [_integer(place, _CONTEXT_NAMES) for place in (config, module)]
    contexts.append(watch.position_rows)
    return LanguageModel(
        module=module,
        vocab_size=min(known, rows),
        max_context=min((c for c in contexts if c is not None), default=None),
        bos=bos if bos is not None and bos < min(known, rows) else None,
    )


def _logits(module: nn.Module, tokens: Tensor) -> Tensor:
    parameters = inspect.signature(module.forward).parameters
    keywords: dict[str, Any] = {}
    if "use_cache" in parameters:
        keywords["use_cache"] = False
    if "targets" in parameters:
        # Some models compute the logits of every position only when they are given targets.
        keywords["targets"] = tokens
    output = module(tokens, **keywords)
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise _TrialError(f"it returned {type(output).__name__}, not logits")
    if output.ndim != 3 or output.shape[:2] != tokens.shape or not output.is_floating_point():
        raise _TrialError(
            f"for token ids {list(tokens.shape)} it returned {list(output.shape)} ({output.dtype})"
        )
    return output


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
            module = original
        else:
            return module


def _embeds_tokens(module: nn.Module) -> bool:
    # Calling every child on token ids could wake modules with a state of their own (metrics, say).
    return not isinstance(module, nn.Embedding) and any(
        isinstance(child, nn.Embedding) for child in module.modules()
    )


def _integer(place: Any, names: Sequence[str], *, least: int = 1) -> int | None:
    values = (getattr(place, name, None) for name in names)
    return next((v for v in values if type(v) is int and v >= least), None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
