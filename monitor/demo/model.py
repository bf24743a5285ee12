"""The demo's model: two layers of attention, small enough to grow induction heads on a laptop.

Learned positions enter only the queries and keys of the first layer. That layer can then attend by
position and the second only by content, the division of labour of an induction circuit; with
positions in both layers the circuit takes far longer than a demo may.

Axes: `batch`, `position`, `head`, `feature`, `vocabulary`.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

BATCH = 16
CONTEXT = 128
STEPS = 1600
WARM_UP_STEPS = 50
GRADIENT_NORM = 1.0


class AttentionOnly(nn.Module):
    """A causal language model of attention layers alone, without multilayer perceptrons."""

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        context: int = CONTEXT,
        layers: int = 2,
        width: int = 96,
        heads: int = 3,
    ) -> None:
        """Draw the weights from torch's global generator; `context` is the longest sequence.

        Raises ValueError if a size is not positive or `width` is not a multiple of `heads`.
        """
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "context": context,
            "layers": layers,
            "width": width,
            "heads": heads,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if width % heads:
            raise ValueError(
                f"width is {width} and heads is {heads}; heads share the width equally, "
                "so make width a multiple of heads"
            )
        self.vocab_size = vocab_size
        self.context = context
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            _Block(width=width, heads=heads, positions=0 if layer else context)
            for layer in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0)
        nn.init.normal_(self.unembedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens [batch position] to next-token logits [batch position vocabulary].

        Raises ValueError if `tokens` has other axes, or more positions than `context`.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected [batch position] "
                f"with at most {self.context} positions: cut the sequences, or build the model "
                "with a larger context"
            )
        residual: Tensor = self.embedding(tokens)
        for block in self.blocks:
            residual = block(residual)
        logits: Tensor = self.unembedding(self.norm(residual))
        return logits


class _Block(nn.Module):
    def __init__(self, *, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.positions = nn.Parameter(0.5 * torch.randn(positions, width)) if positions else None
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=0.5 * width**-0.5)
        nn.init.normal_(self.output.weight, std=0.35 * width**-0.5)

    def forward(self, residual: Tensor) -> Tensor:
        content = self.norm(residual)
        # Added after the norm: inside it, attention by position is too slow to form for a demo.
        placed = content
        if self.positions is not None:
            placed = content + self.positions[: content.shape[1]]
        query, key, value = (
            rearrange(
                projected,
                "batch position (head feature) -> batch head position feature",
                head=self.heads,
            )
            for projected in (self.query(placed), self.key(placed), self.value(content))
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        written: Tensor = self.output(
            rearrange(attended, "batch head position feature -> batch position (head feature)")
        )
        return residual + written


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Make the optimiser the demo was tuned with; clip gradients to a norm of `GRADIENT_NORM`."""
    return torch.optim.AdamW(
        model.parameters(), lr=2e-2, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01
    )


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Raise the learning rate linearly over `WARM_UP_STEPS`, then keep it; step once per batch."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
