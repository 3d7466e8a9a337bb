"""A small GPT that reads and predicts bytes, in plain torch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # a token is a byte


class Size(NamedTuple):
    """Size of a model; the default has 3.3 million parameters."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256  # tokens that it sees at once


def rotary_angles(length: int, width: int, device: torch.device) -> Tensor:
    """Angles by which the pairs of elements at each place are turned, ``(length, width / 2)``."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 2, device=device)
    return torch.arange(length, device=device)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864): attention sees relative places."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention and a two-layer network, each added to what it read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Input and output: ``(batch, length, width)``."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, width / heads) each
        angles = rotary_angles(length, q.shape[-1], x.device)
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of each byte as the next one: ``(batch, length)`` int64 to ``(batch, length, 256)``."""
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; `y` is the byte after each of `x`."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())
