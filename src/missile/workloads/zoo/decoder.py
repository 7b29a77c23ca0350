"""A Llama-like decoder language model in its decode phase: one token per sequence and request, over a cache of keys and
values that lives on the GPU from request to request.

The geometry is TinyLlama's (1.1 B parameters: 22 layers, width 2048, 32 query heads on 4 key/value heads). Every
request reads all weights and the whole cache and computes little: it is the memory-hungriest neighbour there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Decoder", "DecoderGeometry"]


@dataclass(frozen=True, slots=True)
class DecoderGeometry:
    """layers, width, heads (query), kv_heads, hidden (feed-forward width), vocabulary, context (cached tokens)."""

    layers: int = 22
    width: int = 2048
    heads: int = 32
    kv_heads: int = 4
    hidden: int = 5632
    vocabulary: int = 32000
    context: int = 1024

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class _RmsNorm(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
        return (x.float() * scale).to(x.dtype) * self.weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x, shape (batch, heads, head_width); cos and sin of shape (batch, 1, head_width)."""
    low, high = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


class _Layer(nn.Module):  # type: ignore[misc]
    keys: Tensor
    values: Tensor

    def __init__(self, g: DecoderGeometry, batch: int) -> None:
        super().__init__()
        self.g = g
        kv_width = g.kv_heads * g.head_width
        self.attention_norm = _RmsNorm(g.width)
        self.qkv = nn.Linear(g.width, g.width + 2 * kv_width, bias=False)
        self.out = nn.Linear(g.width, g.width, bias=False)
        self.feed_norm = _RmsNorm(g.width)
        self.gate_up = nn.Linear(g.width, 2 * g.hidden, bias=False)
        self.down = nn.Linear(g.hidden, g.width, bias=False)
        cache = torch.zeros(batch, g.kv_heads, g.context, g.head_width)
        self.register_buffer("keys", cache)
        self.register_buffer("values", cache.clone())

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        g, batch = self.g, x.shape[0]
        qkv = self.qkv(self.attention_norm(x)).view(batch, g.heads + 2 * g.kv_heads, g.head_width)
        q, k, v = qkv.split((g.heads, g.kv_heads, g.kv_heads), 1)
        rows = torch.arange(batch, device=x.device)
        self.keys[rows, :, positions] = _rotate(k, cos, sin)
        self.values[rows, :, positions] = v
        # The query heads of one key/value head are the rows of one small matrix product, so the cache is read once.
        q = _rotate(q, cos, sin).view(batch, g.kv_heads, g.heads // g.kv_heads, g.head_width)
        scores = torch.matmul(q, self.keys.transpose(-1, -2)).float() * g.head_width**-0.5
        weights = torch.softmax(scores + mask, -1).to(x.dtype)
        x = x + self.out(torch.matmul(weights, self.values).reshape(batch, g.width))
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):  # type: ignore[misc]
    """`forward(tokens, positions)`: both int64, shape (batch,); returns logits, shape (batch, vocabulary).

    Writes each token's key and value into the cache at its position and attends to the positions up to it.
    """

    frequencies: Tensor

    def __init__(self, batch: int, geometry: DecoderGeometry | None = None) -> None:
        super().__init__()
        self.geometry = g = geometry or DecoderGeometry()
        self.embedding = nn.Embedding(g.vocabulary, g.width)
        self.layers = nn.ModuleList(_Layer(g, batch) for _ in range(g.layers))
        self.norm = _RmsNorm(g.width)
        self.head = nn.Linear(g.width, g.vocabulary, bias=False)
        exponents = torch.arange(0, g.head_width, 2).float() / g.head_width
        self.register_buffer("frequencies", 10000.0**-exponents)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def state_buffers(self) -> dict[str, Tensor]:
        """The cache, by name: device memory whose contents survive from request to request."""
        return {name: b for name, b in self.named_buffers() if name.endswith((".keys", ".values"))}

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        angles = positions.float()[:, None] * self.frequencies.float()
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        later = torch.arange(self.geometry.context, device=tokens.device) > positions[:, None]
        mask = torch.zeros(later.shape, device=tokens.device).masked_fill(later, -torch.inf)[:, None, None]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, positions, cos, sin, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits
