"""A decoder small enough that a training step of 256 rollouts takes tens of milliseconds on one core."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Caches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    vocab: int
    positions: int
    hidden: int = 64
    layers: int = 2
    heads: int = 4


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and added to its input. Attention is written out, because the fused one
    on a CPU has no forward-mode derivative."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.query, self.key, self.value, self.out = (
            nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(shape.hidden, 2 * shape.hidden)
        self.down = nn.Linear(2 * shape.hidden, shape.hidden)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.key(normed)), self.split(self.value(normed))

    def forward(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x and normed [rows, queries, hidden]; keys and values [rows, heads, length, width]."""
        query = self.split(self.query(normed))
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        x = x + self.out((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyDecoder(nn.Module):
    """Token ids in, next-token logits out; embeddings and head share weights."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(shape.vocab, shape.hidden)
            self.places = nn.Embedding(shape.positions, shape.hidden)
            self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.hidden)
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    nn.init.normal_(p, std=0.02 if "tokens" in name or "places" in name else shape.hidden**-0.5)

    def get_output_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """Logits of positions `first` and later, [rows, length − first, vocab]."""
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.tokens(ids) + self.places.weight[:length]
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            normed = layer.norm1(x)
            keys, values = layer.keys(normed)
            if number == last and first:  # nobody reads what stands earlier
                x, normed, mask = x[:, first:], normed[:, first:], mask[first:]
            x = layer(x, normed, keys, values, mask)
        return F.linear(self.norm(x), self.tokens.weight)

    def response_logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Logits that predict each response token, [rows · response, vocab]."""
        ids = torch.cat([prompts, responses[:, :-1]], dim=1)
        return self(ids, prompts.shape[1] - 1).flatten(0, 1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, samples: int, length: int, generator: torch.Generator) -> Tensor:
        """`samples` responses to each prompt, one after the other: [rows · samples, length]. Prompts are read once."""
        caches: Caches = []
        x = self.tokens(prompts) + self.places.weight[: prompts.shape[1]]
        mask = torch.full((prompts.shape[1],) * 2, -torch.inf).triu(1)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            normed = layer.norm1(x)
            keys, values = layer.keys(normed)
            caches.append((_room(keys, samples, length), _room(values, samples, length)))
            x = layer(x, normed, keys, values, mask)
        logits = F.linear(self.norm(x[:, -1]), self.tokens.weight).repeat_interleave(samples, 0)
        drawn = []
        for place in range(prompts.shape[1], prompts.shape[1] + length):
            noise = torch.empty_like(logits).exponential_(generator=generator)
            drawn.append((logits.softmax(-1) / noise).argmax(-1))
            if len(drawn) < length:
                logits = self._next(drawn[-1], place, caches)
        return torch.stack(drawn, dim=1)

    def _next(self, token: Tensor, place: int, caches: Caches) -> Tensor:
        x = (self.tokens(token) + self.places.weight[place]).unsqueeze(1)
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            assert isinstance(layer, Layer)
            normed = layer.norm1(x)
            keys[:, :, place : place + 1], values[:, :, place : place + 1] = layer.keys(normed)
            x = layer(x, normed, keys[:, :, : place + 1], values[:, :, : place + 1], None)
        return F.linear(self.norm(x[:, 0]), self.tokens.weight)


def _room(cache: Tensor, samples: int, length: int) -> Tensor:
    """The cache once per sample, with room for the response."""
    return F.pad(cache.repeat_interleave(samples, 0), (0, 0, 0, length))
