"""With the teacher's weights equal to the student's, there is nothing to learn: exactly 0, at every response position."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from opd.config import OptimizerConfig
from opd.data.pack import pack
from opd.data.rendering import Renderer, eos_ids
from opd.losses import Objective
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, tiny_causal_lm
from opd.trainer.metrics import TokenMetrics
from opd.trainer.policy import Policy
from opd.trainer.student import Student
from opd.types import Prompt, Rollout

LAYOUTS = ("right_padded", "left_padded", "packed")
TEXTS = ("a", "ragged prompts", "of very different lengths, this one being the longest", "b")


@pytest.fixture(scope="module")
def world():
    tokenizer = byte_tokenizer()
    model = tiny_causal_lm(tokenizer, vocab_size=300, initializer_range=0.3)
    renderer = Renderer(tokenizer, name="twin")
    eos = eos_ids(model.generation_config, tokenizer)
    vocabulary = VocabularyMatch(size=258, invalid_ids=(7, 250))
    return tokenizer, model, renderer, eos, vocabulary


def rollouts_of(world) -> list[Rollout]:
    """Sampled responses, one cut to a single token, one that is EOS alone, one ended by EOS, one truncated."""
    _, model, renderer, eos, vocabulary = world
    sampler = HfSampler(model, renderer, Sampling(max_new_tokens=11), eos_ids=eos, pad_id=eos[0], vocabulary=vocabulary)
    drawn = sampler.sample([Prompt(index=i, text=t) for i, t in enumerate(TEXTS)], seed=3)
    ends = [(drawn[0].response_ids[:1], False), ((eos[0],), True)]
    ends += [((*drawn[2].response_ids[:5], eos[0]), True), (drawn[3].response_ids[:11], False)]
    return [
        dataclasses.replace(r, response_ids=tuple(ids), finished=finished, sampler_logp=None)
        for r, (ids, finished) in zip(drawn, ends, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 120, 10_000], ids=["one by one", "a few", "all at once"])
@pytest.mark.parametrize("kind", ["hidden", "dense", "top_k", "sampled"])
def test_every_kl_is_exactly_zero(world, layout, budget, kind):
    _, model, renderer, eos, vocabulary = world
    rollouts = rollouts_of(world)
    objectives = {
        "top_k": Objective(support="teacher_top_k", top_k=16),
        "sampled": Objective(support="sampled", estimator="k2"),
    }
    objective = objectives.get(kind, Objective())
    teacher = LocalTeacher(
        copy.deepcopy(model),
        renderer,
        vocabulary=vocabulary,
        pad_id=eos[0],
        tokens_per_batch=budget,
        layout=layout,
        supply=kind,
    )
    teacher.bind_objective(objective)
    policy = Policy(model, vocabulary=vocabulary, eos_ids=eos, teacher_logits=teacher.logits)
    batches = pack(rollouts, teacher.score(rollouts), layout=layout, tokens_per_microbatch=budget, pad_id=eos[0])
    metrics = TokenMetrics()
    total = sum(policy.loss(batch, objective, metrics).item() for batch in batches)
    assert total == 0.0
    name = "reverse_kl" if kind != "sampled" else "teacher_logp"
    rows = metrics.per_rollout(name)
    assert sorted(len(values) for _, values in rows) == [1, 1, 6, 11], (
        "every response token is supervised, EOS included"
    )
    if kind != "sampled":
        assert all(value == 0.0 for _, values in rows for value in values)
        assert all(value == 0.0 for _, values in metrics.per_rollout("forward_kl") for value in values)


def test_a_target_shifted_by_one_is_not_zero(world):
    """The same check with the teacher's rows moved one position: the zero above is not vacuous."""
    _, model, renderer, eos, vocabulary = world
    rollouts = rollouts_of(world)
    teacher = LocalTeacher(model, renderer, vocabulary=vocabulary, pad_id=eos[0], supply="dense")
    policy = Policy(model, vocabulary=vocabulary, eos_ids=eos, teacher_logits=teacher.logits)
    targets = [dataclasses.replace(t, logits=t.logits.roll(1, dims=0)) for t in teacher.score(rollouts)]
    (batch,) = pack(rollouts, targets, layout="packed", tokens_per_microbatch=10_000, pad_id=eos[0])
    assert float(policy.loss(batch, Objective(), TokenMetrics())) > 0.1


def test_dropout_is_off_even_where_training_mode_is_needed(world):
    """Gradient checkpointing works in training mode only; a student with dropout would then differ from itself."""
    _, _, renderer, eos, _ = world
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_layer=2, n_embd=32, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config).eval()
    vocabulary = VocabularyMatch(size=258)
    teacher = LocalTeacher(copy.deepcopy(model), renderer, vocabulary=vocabulary, pad_id=eos[0])
    student = Student(
        model,
        OptimizerConfig(),
        vocabulary=vocabulary,
        eos_ids=eos,
        teacher_logits=teacher.logits,
        total_steps=1,
        gradient_checkpointing=True,
    )
    rollouts = rollouts_of(world)
    batches = pack(rollouts, teacher.score(rollouts), layout="right_padded", tokens_per_microbatch=9999, pad_id=eos[0])
    out = student.update(batches, Objective())
    assert out.loss == pytest.approx(0, abs=1e-7)
    assert out.metrics["grad_norm"] < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_sequence_alone(world, layout):
    """Padding and packing change nothing: each response token's logits equal a plain forward pass over its own sequence."""
    _, model, _, eos, vocabulary = world
    rollouts = rollouts_of(world)
    policy = Policy(model, vocabulary=vocabulary, eos_ids=eos, teacher_logits=lambda target: target.hidden)
    (batch,) = pack(rollouts, None, layout=layout, tokens_per_microbatch=10_000, pad_id=eos[0])
    expected = []
    for rollout in batch.rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected.append(logits[:, :258].index_fill(-1, torch.tensor([7, 250]), -torch.inf))
    torch.testing.assert_close(policy.logits(batch), torch.cat(expected), atol=2e-5, rtol=1e-5)
