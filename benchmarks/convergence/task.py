"""Sorting digits: prompts, a badly taught base, the reward, and the expected accuracy without sampling noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.convergence.model import Shape, TinyDecoder
from opd.demo.task import WRONG
from opd.seeding import derive_seed

DOMAINS = 2  # sorted upwards after separator 10, downwards after separator 11
VOCAB = 10 + DOMAINS
HELD_OUT = 256
FIT_STEPS, FIT_ROWS, FIT_LR, FIT_WARMUP = 400, 128, 4e-3, 50


@dataclass(frozen=True)
class Prompts:
    """Rows of digits and a separator, and what they should become."""

    ids: Tensor
    """[rows, digits + 1]"""
    answers: Tensor
    """[rows, digits]"""
    domain: Tensor
    """[rows], 0 upwards, 1 downwards"""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def at(self, rows: Tensor) -> Prompts:
        return Prompts(self.ids[rows], self.answers[rows], self.domain[rows])


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, step, purpose))


def draw_prompts(rows: int, digits: int, domains: tuple[int, ...], source: torch.Generator) -> Prompts:
    """Random digits; domains take turns."""
    numbers = torch.randint(0, 10, (rows, digits), generator=source)
    domain = torch.tensor(domains)[torch.arange(rows) % len(domains)]
    upwards = numbers.sort(-1).values
    answers = torch.where(domain.unsqueeze(-1) == 0, upwards, upwards.flip(-1))
    return Prompts(torch.cat([numbers, 10 + domain.unsqueeze(-1)], dim=1), answers, domain)


def held_out(seed: int, digits: int, domains: tuple[int, ...]) -> Prompts:
    """The same for every method of a seed."""
    return draw_prompts(HELD_OUT, digits, domains, generator(seed, 0, "held out"))


def spoilt(answers: Tensor, scale: float, source: torch.Generator) -> Tensor:
    """Each digit d replaced by another one with probability scale · WRONG[d], as in the demo."""
    wrong = torch.tensor(WRONG)[answers] * scale
    other = (answers + torch.randint(1, 10, answers.shape, generator=source)) % 10
    return torch.where(torch.rand(answers.shape, generator=source) < wrong, other, answers)


def rewards(prompts: Prompts, samples: int, responses: Tensor) -> Tensor:
    """1 for a response that is the sorted prompt in full, else 0; [rows · samples]."""
    return (responses == prompts.answers.repeat_interleave(samples, 0)).all(-1).double()


@torch.no_grad()
def accuracy(model: TinyDecoder, prompts: Prompts) -> tuple[float, float]:
    """Expected accuracy of sampling at temperature 1, exactly: the mean of the right answer's probability. And that of greedy decoding."""
    logp = model.response_logits(prompts.ids, prompts.answers).log_softmax(-1)
    right = logp.gather(-1, prompts.answers.reshape(-1, 1)).view(prompts.answers.shape)
    greedy = (logp.argmax(-1).view(prompts.answers.shape) == prompts.answers).all(-1)
    return float(right.sum(-1).exp().mean()), float(greedy.double().mean())


def fitted(shape: Shape, digits: int, scale: float, domains: tuple[int, ...], seed: int) -> TinyDecoder:
    """A model after cross-entropy on spoilt answers."""
    model = TinyDecoder(shape, derive_seed(seed, 0, "weights") % 2**32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = FIT_STEPS * len(domains)
    for step in range(steps):
        source = generator(seed, step, "fit")
        prompts = draw_prompts(FIT_ROWS, digits, domains, source)
        answers = spoilt(prompts.answers, scale, source)
        loss = F.cross_entropy(model.response_logits(prompts.ids, answers), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = FIT_LR * min((step + 1) / FIT_WARMUP, (steps - step) / (steps - FIT_WARMUP))
        optimizer.step()
    return model
