"""Models with random weights, and what can be done with them: the model's own forward pass, what
phasewatch does, and the same by TransformerLens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from monitor.anatomy import find_language_model
from monitor.capture import observe
from monitor.evidence import Evidence
from monitor.probes import induction
from monitor.stimuli import Stimulus, repeated

Work = Callable[[Stimulus], object]


def stimulus_for(model: nn.Module, sequences: int, positions: int) -> Stimulus:
    """Repeated random tokens."""
    return repeated(
        vocab_size=model.config.vocab_size, sequences=sequences, context=positions, bos=0, seed=0
    )


def forward(model: nn.Module) -> Work:
    """The model's own pass, with logits."""

    def work(stimulus: Stimulus) -> Tensor:
        with torch.no_grad():
            return model(stimulus.tokens.to(model.device), use_cache=False).logits

    return work


def forward_and_backward(model: nn.Module) -> Work:
    """The model's own pass and that of its gradients, as in training."""

    def work(stimulus: Stimulus) -> None:
        tokens = stimulus.tokens.to(model.device)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        torch.autograd.grad(loss, list(model.parameters()))

    return work


def forward_without_logits(model: nn.Module) -> Work:
    """The model's own pass up to the unembedding."""

    def work(stimulus: Stimulus) -> Tensor:
        with torch.no_grad():
            tokens = stimulus.tokens.to(model.device)
            return model.base_model(tokens, use_cache=False).last_hidden_state

    return work


def attention_probe(model: nn.Module) -> Work:
    """Every attention field of every head, entropy included."""
    found = find_language_model(model)
    # A monitor learns the number of calls from its first pass, which is not what is compared here.
    calls = model.config.num_hidden_layers

    def work(stimulus: Stimulus) -> object:
        seen = observe(found, stimulus, attention=True, attention_calls=calls)
        return induction.compute(Evidence(observations={"repeated": seen}))

    return work


def in_context_losses(model: nn.Module) -> Work:
    """The loss of every token."""
    found = find_language_model(model)
    return lambda stimulus: observe(found, stimulus, losses=True)


def transformer_lens(model: nn.Module) -> Work:
    """The same fields from the patterns that TransformerLens caches; it gets a copy of the model.

    It caches nothing else here. The patterns are returned too: to look at them is what it is for.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    copied = copy.deepcopy(model)
    bridge = build_bridge_from_module(copied, type(model).__name__, hf_config=copied.config)

    def work(stimulus: Stimulus) -> object:
        stimulus = stimulus.rows(0, len(stimulus.tokens), model.device)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                stimulus.tokens, names_filter=lambda name: name.endswith("hook_pattern")
            )
            layers = range(model.config.num_hidden_layers)
            return [_fields(cache["pattern", layer], stimulus) for layer in layers], cache

    return work


def _fields(pattern: Tensor, stimulus: Stimulus) -> dict[str, Tensor]:
    """The attention fields of one layer's heads."""
    fields = {
        name: pattern[at.sequence, :, at.query, at.key].sum(0) / at.queries.sum()
        for name, at in stimulus.targets.items()
    }
    fields["beyond_position"] = fields["prefix_matching"] - fields.pop("other_period")
    rows = torch.special.entr(pattern).sum(-1)[..., 1:]
    in_view = torch.arange(2, pattern.shape[-1] + 1, device=pattern.device)
    fields["entropy"] = rows.mean((0, 2))
    fields["normalized_entropy"] = (rows / in_view.log()).mean((0, 2))
    fields["same_offset"] = _same_offset(pattern, stimulus)
    return {name: values.cpu() for name, values in fields.items()}


def _same_offset(pattern: Tensor, stimulus: Stimulus) -> Tensor:
    """How often the sampled queries of sequences of different periods attend equally far back."""
    each = torch.arange(len(pattern), device=pattern.device)[:, None]
    rows = pattern[each, :, stimulus.sampled]
    key = stimulus.sampled[..., None] - torch.arange(pattern.shape[-1], device=pattern.device)
    at_offset = rows.gather(-1, key.clamp(min=0)[:, :, None].expand_as(rows))
    profile = at_offset.where((key >= 0)[:, :, None], 0.0).mean(1)
    pairs = (stimulus.period[:, None] != stimulus.period).float()
    return torch.einsum("aho,bho,ab->h", profile, profile, pairs) / pairs.sum()


def gpt2(*, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    """A GPT-2 with random weights."""
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def gpt_neox(*, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> nn.Module:
    """A GPT-NeoX with random weights."""
    config = GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
    )
    return GPTNeoXForCausalLM(config).eval()


# By name, for a given number of positions.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "2 layers, width 256": lambda positions: gpt2(
        layers=2, width=256, heads=4, vocabulary=4096, positions=positions
    ),
    "2 layers, width 512": lambda positions: gpt2(
        layers=2, width=512, heads=8, vocabulary=4096, positions=positions
    ),
    "2 layers, vocabulary 50,257": lambda positions: gpt2(
        layers=2, width=256, heads=4, vocabulary=50257, positions=positions
    ),
    "GPT-2 small": lambda positions: gpt2(
        layers=12, width=768, heads=12, vocabulary=50257, positions=positions
    ),
    "Pythia 410M": lambda positions: gpt_neox(
        layers=24, width=1024, heads=16, vocabulary=50304, positions=positions
    ),
}

# The models that are compared: name, sequences and positions.
CASES = [
    ("2 layers, width 256", 16, 257),
    ("GPT-2 small", 2, 257),
    ("GPT-2 small", 1, 1025),
    ("Pythia 410M", 1, 513),
]
