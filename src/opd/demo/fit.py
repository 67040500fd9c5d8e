"""Supervised training of the demo's two models: one on correct answers, one on spoilt ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd.data.pack import layout_sequences
from opd.data.rendering import Renderer
from opd.demo.task import draw
from opd.models import response_logits

STEPS = 300
BATCH = 128
PEAK_LR = 4e-3
WARMUP = 50


def fit(
    model: PreTrainedModel,
    renderer: Renderer,
    answer: Callable[[str, random.Random], str],
    *,
    seed: int,
    steps: int = STEPS,
) -> float:
    """Cross-entropy on fresh (prompt, answer) pairs, AdamW with warm-up and linear decay; returns the last loss (nats per token)."""
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP))
    )
    loss = float("nan")
    for _ in range(steps):
        pairs = [draw(generator) for _ in range(BATCH)]
        prompts = [renderer.response_ids(prompt, finished=False) for prompt, _ in pairs]
        responses = [renderer.response_ids(answer(gold, generator)) for _, gold in pairs]
        sequences = layout_sequences(prompts, responses, layout="right_padded", pad_id=0)
        labels = torch.tensor([token for response in responses for token in response])
        value = F.cross_entropy(response_logits(model, sequences), labels)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss = value.item()
    return loss
