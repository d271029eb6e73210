"""A small language model in torch. Imported by what trains in torch alone."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Causal attention and a layer of relu, each on a normalised residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        mixed = self.mix(functional.rms_norm(x, (width,)))
        query, key, value = mixed.view(batch, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, places, width))
        return x + self.down(functional.relu(self.up(functional.rms_norm(x, (width,)))))


class Decoder(nn.Module):
    """(batch, places) characters to logits, (batch, places, vocabulary)."""

    def __init__(self, vocabulary: int, places: int, width: int, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(places, width))
        self.blocks = nn.ModuleList(Block(width, max(1, width // 32)) for _ in range(depth))
        self.output = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.positions[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.output(functional.rms_norm(x, (x.shape[-1],)))


def cross_entropy(model: nn.Module, text: Tensor) -> Tensor:
    """Nats a character of (batch, places + 1) characters."""
    logits = cast(Tensor, model(text[:, :-1]))
    return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
