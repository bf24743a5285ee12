"""Transformers as nanoGPT and LitGPT write them, cut down to their attention and what it needs.

Names, order of operations and branches are theirs, since those are what is to be recognised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.hugging_face import CONTEXT, HEADS, KEYHEADS, LAYERS, VOCABULARY, WIDTH


class NanoAttention(nn.Module):
    """karpathy/nanoGPT, model.py, CausalSelfAttention."""

    def __init__(self, *, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.attn_dropout = nn.Dropout(0.1)
        self.flash = flash
        if not flash:
            mask = torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT)
            self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        k = k.view(batch, positions, HEADS, width // HEADS).transpose(1, 2)
        q = q.view(batch, positions, HEADS, width // HEADS).transpose(1, 2)
        v = v.view(batch, positions, HEADS, width // HEADS).transpose(1, 2)
        if self.flash:
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :positions, :positions] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, positions, width))


class NanoBlock(nn.Module):
    def __init__(self, *, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = NanoAttention(flash=flash)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """It gives the logits of all positions only when it is given targets."""

    def __init__(self, *, flash: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(NanoBlock(flash=flash) for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        _spread(self)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@dataclass(frozen=True, kw_only=True)
class LitConfig:
    """What of LitGPT's configuration is used here, under its names."""

    n_head: int = HEADS
    n_query_groups: int = KEYHEADS
    head_size: int = WIDTH // HEADS
    rope_n_elem: int = WIDTH // HEADS
    sliding_window_size: int | None = None
    attention_logit_softcapping: float | None = None
    attention_scores_scalar: int | None = None


class LitAttention(nn.Module):
    """Lightning-AI/litgpt, litgpt/model.py, CausalSelfAttention: one projection, its queries first;
    a part of the features rotated; a function of its own that is called like torch's.
    """

    def __init__(self, config: LitConfig) -> None:
        super().__init__()
        rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.qkv = nn.Linear(WIDTH, rows, bias=False)
        self.proj = nn.Linear(config.head_size * config.n_head, WIDTH, bias=False)
        self.config = config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        config = self.config
        batch, positions, _ = x.size()
        query_size = config.n_head * config.head_size
        key_size = value_size = config.n_query_groups * config.head_size
        q, k, v = self.qkv(x).split((query_size, key_size, value_size), dim=-1)
        q = q.view(batch, positions, config.n_head, config.head_size).transpose(1, 2)
        k = k.view(batch, positions, config.n_query_groups, config.head_size).transpose(1, 2)
        v = v.view(batch, positions, config.n_query_groups, config.head_size).transpose(1, 2)
        rotated = config.rope_n_elem
        q = torch.cat((_rope(q[..., :rotated], cos, sin), q[..., rotated:]), dim=-1)
        k = torch.cat((_rope(k[..., :rotated], cos, sin), k[..., rotated:]), dim=-1)
        if config.n_query_groups != config.n_head:
            q_per_kv = config.n_head // config.n_query_groups
            k = k.repeat_interleave(q_per_kv, dim=1)
            v = v.repeat_interleave(q_per_kv, dim=1)
        if config.sliding_window_size is not None:
            mask = torch.full((positions, positions), float("-inf"), dtype=q.dtype)
            for i in range(positions):
                mask[i, max(0, i - config.sliding_window_size + 1) : i + 1] = 0.0
            mask = mask.view(1, 1, positions, positions)
        y = self.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(y.reshape(batch, positions, config.head_size * config.n_head))

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        scale = 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
        if self.config.attention_logit_softcapping is not None:
            thresh = self.config.attention_logit_softcapping
            scores = q @ k.mT * scale
            scores = torch.tanh(scores / thresh) * thresh
            if mask is None:
                mask = torch.ones(q.size(2), q.size(2), dtype=q.dtype).triu(diagonal=1)
                mask.masked_fill_(mask.bool(), torch.finfo(q.dtype).min)
            scores = scores + mask
            scores = F.softmax(scores, dim=-1, dtype=torch.float).to(dtype=q.dtype)
            y = scores @ v
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=0.0, scale=scale, is_causal=mask is None
            )
        return y.transpose(1, 2)


class LitBlock(nn.Module):
    def __init__(self, config: LitConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
        self.attn = LitAttention(config)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attn(self.norm_1(x), cos, sin) + x
        return self.mlp(self.norm_2(x)) + x


class LitGPT(nn.Module):
    """Every option is one of `LitConfig`'s."""

    def __init__(self, **options: float | None) -> None:
        super().__init__()
        config = LitConfig(**options)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "h": nn.ModuleList(LitBlock(config) for _ in range(LAYERS)),
                "ln_f": nn.RMSNorm(WIDTH, eps=1e-5),
            }
        )
        self.max_seq_length = CONTEXT
        theta = 1.0 / 10_000 ** (torch.arange(0, config.rope_n_elem, 2) / config.rope_n_elem)
        angles = torch.outer(torch.arange(CONTEXT), theta).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        _spread(self)

    def forward(self, idx: Tensor, lm_head_chunk_size: int = 0) -> Tensor | list[Tensor]:
        positions = idx.size(1)
        cos, sin = self.cos[:positions].unsqueeze(0), self.sin[:positions].unsqueeze(0)
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:
            x = block(x, cos, sin)
        x = self.transformer["ln_f"](x)
        if lm_head_chunk_size > 0:
            return [self.lm_head(part) for part in x.split(lm_head_chunk_size, dim=1)]
        return self.lm_head(x)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos.unsqueeze(1)) + (rotated * sin.unsqueeze(1))).to(dtype=x.dtype)


def _spread(model: nn.Module) -> None:
    """Weights so large that attention is far from uniform; the same for every model built."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4, generator=generator)
