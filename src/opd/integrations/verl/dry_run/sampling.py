"""One sequence at a time through a transformers model: drawn from it, with the log-probs it was drawn with, or scored by it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.errors import ConfigError
from opd.teachers.vocabulary import embedding_rows


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings of the sampler. The log-probs that `sample` returns are of the distribution after all of this."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 and 0 are off."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"rollout temperature={self.temperature} must be ≥ 0 and top_p={self.top_p} in (0, 1]; 1.0 leaves either off."
            )


def log_probs(logits: Tensor, sampling: SamplingSettings) -> Tensor:
    """Log-probs of the next token, −inf where it cannot be drawn."""
    if sampling.temperature == 0:
        return torch.full_like(logits, -torch.inf).index_fill_(-1, logits.argmax(-1), 0.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits.log_softmax(-1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    sampling: SamplingSettings,
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    seed: int,
) -> tuple[list[int], list[float]]:
    """Token ids and their log-probs (nats), the stop token included when one was drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.tensor([list(prompt_ids)]), None
    tokens: list[int] = []
    logps: list[float] = []
    for _ in range(max_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logp = log_probs(out.logits[0, -1:].float(), sampling)[0]
        token = int(torch.multinomial(logp.exp(), 1, generator=generator))
        tokens.append(token)
        logps.append(float(logp[token]))
        if token in stop_ids:
            break
        ids = torch.tensor([[token]])
    return tokens, logps


@torch.no_grad()
def score(model: PreTrainedModel, ids: Sequence[int], top_k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and their log-probs (nats) as verl reads `prompt_logprobs`: row t is about the token after t, the top_k likeliest
    first, or the very token when top_k is 0; the last row is a dummy."""
    rows = embedding_rows(model)
    read = torch.tensor([list(ids)])
    read = read.masked_fill(read >= rows, 0)  # padding of the student's: the actor leaves out what is said after it
    logp = model(input_ids=read).logits[0, :-1].float().log_softmax(-1)
    if not 0 <= top_k <= logp.shape[-1]:
        raise ConfigError(
            f"prompt_logprobs={top_k} asks for more tokens than the {logp.shape[-1]} that the teacher knows; lower opd.objective.top_k."
        )
    if top_k > 0:
        said, tokens = logp.topk(top_k, dim=-1)
    else:
        tokens = torch.tensor(list(ids[1:]), dtype=torch.int64).unsqueeze(-1)
        inside = tokens < logp.shape[-1]
        said = torch.where(inside, logp.gather(-1, tokens.where(inside, 0)), -torch.inf)
    width = max(top_k, 1)
    return [*tokens.tolist(), [0] * width], [*said.tolist(), [0.0] * width]


def seed_of(*parts: object) -> int:
    """A seed that is the same in every process, whatever order requests arrive in."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
