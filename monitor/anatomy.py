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

from monitor.adapters import ModuleAdapter, check_adapters
from monitor.tasks import AnyTask, check_task
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
    it names no beginning-of-sequence token. Its logits are `width` wide; they are what the linear
    layers of that width give in call number `unembedding_call` of a pass, None where they are not
    just that. `adapters` read the attention of modules that compute it in a way of their own.
    One that can only read the questions of a `task` may have no logits but those of the answer.
    """

    module: nn.Module
    vocab_size: int
    max_context: int | None
    bos: int | None
    width: int
    unembedding_call: int | None
    adapters: Mapping[type[nn.Module], ModuleAdapter]
    task: AnyTask | None = None

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
        """The model's logits; to be called inside `untouched`. Those of a model of a task may be
        at one position, that of the answer.
        """
        return _logits(self.module, tokens, answers=self.task is not None)


def find_language_model(
    root: nn.Module,
    *,
    vocab_size: int | None = None,
    adapters: Mapping[type[nn.Module], ModuleAdapter] | None = None,
    task: AnyTask | None = None,
) -> LanguageModel:
    """The language model in `root`: `root` itself if it maps token ids to logits, else the one
    submodule that does. Wrappers of torch.compile and DistributedDataParallel are looked through.
    Where a `task` is given, one will do that can read its questions alone.

    Raises `TypeError` where `root` is no module, `adapters` are none or `task` is none,
    `NotALanguageModelError` where none or several are found, and `ValueError` where `vocab_size` is
    larger than the model's own.
    """
    adapters, task = check_adapters(adapters), check_task(task)
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
            found[path] = _read(inner, vocab_size, adapters, task)
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


def covers(tokens: Int[Tensor, "batch position"], values: Tensor) -> bool:
    """Whether values have a row for every token, in one dimension or two."""
    return values.numel() == tokens.numel() * values.shape[-1]


def mixing_module(
    model: LanguageModel, tokens: Int[Tensor, "batch position"]
) -> tuple[str, str] | None:
    """Path and class of the first, innermost module through which a token reaches later positions:
    where attention is, whatever computes it. None where no module's own inputs and outputs show it.
    """
    names = {id(module): name for name, module in model.module.named_modules()}
    found: list[nn.Module] = []
    # Two sequences that differ in their first token alone.
    pair = tokens[:1].repeat(2, 1)
    pair[1, 0] = (pair[0, 0] + 1) % model.vocab_size

    def differing(value: Any) -> Tensor | None:
        first = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(first, Tensor) or first.ndim < 3 or first.shape[:2] != pair.shape:
            return None
        return (first[0] != first[1]).flatten(1).any(-1)

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = differing(args or list(kwargs.values())), differing(output)
        if before is not None and after is not None:
            found.extend([module] * bool(after[1:].any() and not before[1:].any()))

    hooks = [m.register_forward_hook(compare, with_kwargs=True) for m in model.module.modules()]
    try:
        with untouched(model.module):
            model.logits(pair)
    finally:
        for hook in hooks:
            hook.remove()
    return (names[id(found[0])], type(found[0]).__name__) if found else None


class _TrialError(Exception):
    """Why a module is not a language model."""


class _TrialWatch(TorchFunctionMode):
    """Notes the sizes of the embeddings that are asked for the token ids and for the positions, and
    what the linear layers over all positions gave.
    """

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.token_rows: int | None = None
        self.position_rows: int | None = None
        self.linear: list[Tensor] = []

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
        output = func(*args, **(kwargs or {}))
        if func is F.linear and covers(self.tokens, output):
            self.linear.append(output)
        return output

    def unembedding_call(self, logits: Tensor) -> int | None:
        """Which of the linear calls as wide as the logits gave just them, counted from 1."""
        as_wide = [output for output in self.linear if output.shape[-1] == logits.shape[-1]]
        same = [torch.equal(output.view_as(logits).to(logits.dtype), logits) for output in as_wide]
        return same.index(True) + 1 if same.count(True) == 1 else None


def _read(
    module: nn.Module,
    vocab_size: int | None,
    adapters: Mapping[type[nn.Module], ModuleAdapter],
    task: AnyTask | None,
) -> LanguageModel:
    """What must be known of a language model; raises `_TrialError` where a module is none."""
    # Every vocabulary has the ids 0 and 1; together they cannot be mistaken for positions.
    tokens = (torch.arange(2 * _TRIAL_POSITIONS) % 2).view(2, _TRIAL_POSITIONS)
    try:
        return _tried(module, vocab_size, adapters, tokens)
    except _TrialError:
        if task is None:
            raise
        return _tried(module, vocab_size, adapters, task.questions().trial, task)


def _tried(
    module: nn.Module,
    vocab_size: int | None,
    adapters: Mapping[type[nn.Module], ModuleAdapter],
    tokens: Int[Tensor, "2 position"],
    task: AnyTask | None = None,
) -> LanguageModel:
    tokens = tokens.to(next((p.device for p in module.parameters()), torch.device("cpu")))
    try:
        with untouched(module), _TrialWatch(tokens) as watch:
            logits = _logits(module, tokens, answers=task is not None)
    except _TrialError:
        raise
    except Exception as error:
        raise _TrialError(f"{type(error).__name__}: {_first_line(error)}") from error
    width = logits.shape[-1]
    rows = watch.token_rows or max(width, 0 if task is None else task.questions().vocabulary)
    # What is never an answer, "=" say, may have no logit.
    least = rows if task is None else task.questions().width
    if width < least:
        of = "its {} embedded token ids" if task is None else "the {} that the task's answers need"
        raise _TrialError(f"its output is {width} wide, less than {of.format(least)}")
    config = getattr(module, "config", None)
    known = vocab_size or _integer(config, ("vocab_size",)) or rows
    if vocab_size is not None and vocab_size > rows:
        raise ValueError(
            f"vocab_size={vocab_size} is larger than the model's own vocabulary of {rows} "
            f"token ids: pass at most {rows}"
        )
    bos = _integer(config, ("bos_token_id",), least=0)
    contexts = [_integer(place, _CONTEXT_NAMES) for place in (config, module)]
    contexts.append(watch.position_rows if task is None else tokens.shape[1])
    return LanguageModel(
        module=module,
        vocab_size=min(known, rows),
        max_context=min((c for c in contexts if c is not None), default=None),
        bos=bos if bos is not None and bos < min(known, rows) else None,
        width=width,
        unembedding_call=watch.unembedding_call(logits) if task is None else None,
        adapters=adapters,
        task=task,
    )


def _logits(module: nn.Module, tokens: Tensor, *, answers: bool = False) -> Tensor:
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
    if answers and output.ndim == 2:
        output = output[:, None]
    shapes = [tokens.shape, (len(tokens), 1)][: 1 + answers]
    if output.ndim != 3 or output.shape[:2] not in shapes or not output.is_floating_point():
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
