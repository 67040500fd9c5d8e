"""Random inputs from a seed, and the error bound that a fast version has to keep against its plain twin."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.types import DenseTarget, Head, HiddenTarget, Prompt, Rollout, SampledTarget, Target, TargetKind, TopKTarget


def random_logits(
    tokens: int,
    vocab: int,
    *,
    seed: int = 0,
    scale: float = 2.0,
    valid_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gaussian logits [tokens, vocab]; columns at or beyond `valid_vocab` are −inf."""
    logits = scale * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if valid_vocab is not None:
        logits[:, valid_vocab:] = -torch.inf
    return logits.to(dtype)


def target_from_logits(
    kind: TargetKind, teacher_logits: Tensor, response_ids: Tensor, *, top_k: int = 4
) -> SampledTarget | TopKTarget | DenseTarget:
    """The target of the given kind for these response tokens, from a teacher with these logits."""
    teacher_logp = teacher_logits.log_softmax(-1)
    sampled_logp = teacher_logp.gather(-1, response_ids[:, None]).squeeze(-1)
    if kind == "sampled":
        return SampledTarget(teacher_logp=sampled_logp)
    if kind == "top_k":
        best = teacher_logp.topk(top_k, dim=-1)
        return TopKTarget(ids=best.indices, teacher_logp=best.values, sampled_logp=sampled_logp)
    if kind == "dense":
        return DenseTarget(logits=teacher_logits)
    raise ValueError(f"logits alone do not make a {kind!r} target; random_target does")


def random_target(
    kind: TargetKind,
    tokens: int,
    vocab: int,
    *,
    seed: int = 0,
    top_k: int = 4,
    hidden: int = 8,
    valid_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Target:
    """A target of the given kind from a random teacher; a sampled target is about random response tokens."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "hidden":
        states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
        return HiddenTarget(hidden=states, head=Head(weight=weight, valid_vocab=valid_vocab))
    logits = random_logits(tokens, vocab, seed=seed, valid_vocab=valid_vocab, dtype=dtype)
    response_ids = torch.randint(valid_vocab or vocab, (tokens,), generator=generator)
    return target_from_logits(kind, logits, response_ids, top_k=top_k)


def random_rollout(
    prompt_length: int, response_length: int, vocab: int, *, seed: int = 0, index: int = 0, finished: bool = True
) -> Rollout:
    """A rollout of random ids below `vocab`, with sampler log-probs between −3 and 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (prompt_length + response_length,), generator=generator).tolist()
    sampler_logp = (-3 * torch.rand(response_length, generator=generator)).tolist()
    return Rollout(
        prompt=Prompt(index=index, text=f"prompt {index}"),
        prompt_ids=tuple(ids[:prompt_length]),
        response_ids=tuple(ids[prompt_length:]),
        sampler_logp=tuple(sampler_logp),
        finished=finished,
        policy_version=0,
    )


def assert_close_to_reference(
    actual: Tensor, plain: Tensor, exact: Tensor, *, slack: float = 2.0, floor: float = 1e-7
) -> None:
    """max|actual − exact| ≤ slack · max|plain − exact| + floor · max(1, max|exact|).

    `plain` is the plain version in the precision of `actual`; `exact` is the plain version in float64. A fast version
    may err as much as the plain one does, and no more. Infinities must sit in the same places, and nothing may be NaN.
    """
    assert actual.shape == plain.shape == exact.shape, f"shapes differ: {actual.shape}, {plain.shape}, {exact.shape}"
    actual, plain, exact = actual.detach().double(), plain.detach().double(), exact.detach().double()
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), "infinities differ from the reference"
    if not finite.any():
        return
    error = (actual - exact)[finite].abs()
    plain_error = (plain - exact)[finite].abs().max()
    bound = slack * plain_error + floor * max(1.0, float(exact[finite].abs().max()))
    worst = int(error.argmax())
    assert error[worst] <= bound, (
        f"error {error[worst]:.3e} exceeds {bound:.3e} (plain version's own error {plain_error:.3e}): "
        f"got {actual[finite][worst]:.9g}, exact {exact[finite][worst]:.9g}"
    )
