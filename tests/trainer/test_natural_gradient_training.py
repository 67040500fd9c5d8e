"""`optimizer.name=natural_gradient` in real runs, and what is said about recipes that do not suit it."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.config import OptimizerConfig
from opd.config.optimizer import NaturalGradientConfig
from opd.config.recipe import build, merge, read_recipe
from opd.data.pack import pack
from opd.demo.prepare import prepare
from opd.demo.recipe import recipe_path
from opd.doctor.checks import notices
from opd.errors import ConfigError, NonFiniteError
from opd.losses import Objective
from opd.reporting.record import read_metrics
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import random_logits, random_rollout, tiny_causal_lm
from opd.trainer.run import train
from opd.trainer.student import Student
from opd.types import DenseTarget
from worlds import settings

NATURAL = {"optimizer__name": "natural_gradient", "optimizer__lr": None, "optimizer__warmup_steps": None}
VOCAB = 40
LENGTHS = (1, 9, 3, 7, 2, 5, 8, 4)
MARGIN = 0.5  # of AdamW's loss after ten steps; over five seeds it was 0.17 to 0.28


def config_of(world, tmp_path, **more):
    return build(merge({}, settings(world, tmp_path / "run", **(NATURAL | more))))


def run_steps(config) -> list[dict[str, float]]:
    train(config)
    return [dict(r.metrics) for r in read_metrics(config.run_dir) if r.kind == "step"]


def student_of(
    model, *, weight_decay: float = 0.0, lr: float | None = None, vocabulary: int = VOCAB, **solver
) -> Student:
    config = OptimizerConfig(
        name="natural_gradient", natural_gradient=NaturalGradientConfig(**solver), weight_decay=weight_decay, lr=lr
    )
    return Student(
        copy.deepcopy(model),
        config,
        vocabulary=VocabularyMatch(size=vocabulary),
        eos_ids=(0,),
        teacher_logits=lambda target: target.hidden,
        total_steps=10,
    )


@pytest.fixture(scope="module")
def model():
    return tiny_causal_lm(VOCAB, hidden=32, initializer_range=0.3, max_positions=64)


def batches_of(budget: int, layout: str = "right_padded", vocabulary: int = VOCAB):
    rollouts = [random_rollout(2 + 3 * (i % 3), n, vocabulary, seed=i, index=i) for i, n in enumerate(LENGTHS)]
    targets = [DenseTarget(logits=random_logits(n, vocabulary, seed=100 + i)) for i, n in enumerate(LENGTHS)]
    return pack(rollouts, targets, layout=layout, tokens_per_microbatch=budget, pad_id=0)


def flat(student: Student) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters()])


def moved_by(model, budget: int, layout: str = "right_padded", **more) -> torch.Tensor:
    student = student_of(model, **more)
    before = flat(student)
    student.update(batches_of(budget, layout), Objective())
    return flat(student) - before


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize(("budget", "layout"), [(40, "right_padded"), (1, "right_padded"), (30, "packed")])
def test_micro_batches_give_the_step_of_the_whole_batch(model, budget, layout, keep_graphs):
    """One micro-batch against three, eight, and packed ones: Fisher matrix and gradient are those of the step."""
    assert len(batches_of(10_000)) == 1 and len(batches_of(40)) == 3
    whole = moved_by(model, 10_000, iterations=5)
    split = moved_by(model, budget, layout, iterations=5, keep_graphs=keep_graphs)
    assert whole.norm() > 0.01
    assert (split - whole).norm() <= 1e-5 * whole.norm()


def test_a_step_lowers_the_loss_and_says_how_far_it_went(model):
    student, batches = student_of(model), batches_of(60)
    losses = []
    for _ in range(4):
        out = student.update(batches, Objective())
        losses.append(out.loss)
        assert out.metrics["natural/predicted_kl"] <= 0.1 * (1 + 1e-6)
        assert 0 < out.metrics["natural/scale"] <= 1
        assert out.metrics["natural/residual"] < 1
        assert out.metrics["natural/iterations"] == 10
        assert out.metrics["lr"] == 1.0
    assert losses == sorted(losses, reverse=True)


def test_the_learning_rate_is_a_factor_of_the_step(model):
    whole, half = (moved_by(model, 10_000, lr=lr) for lr in (None, 0.5))
    torch.testing.assert_close(half, 0.5 * whole, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_decoupled_and_spares_vectors(model):
    student, plain = student_of(model, weight_decay=0.25), student_of(model)
    before = [p.detach().clone() for p in plain.parameters()]
    for one in (student, plain):
        one.update(batches_of(10_000), Objective())
    for first, decayed, other in zip(before, student.parameters(), plain.parameters(), strict=True):
        expected = other - 0.25 * first if first.dim() >= 2 else other
        torch.testing.assert_close(decayed.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("temperature", "vocabulary"), [(1.0, VOCAB), (2.0, VOCAB), (0.5, VOCAB), (1.0, 10)])
def test_predicted_kl_is_that_of_the_distributions_in_the_loss(model, temperature, vocabulary):
    """At the student's temperature, over the common vocabulary."""
    student, batches = (
        student_of(model, vocabulary=vocabulary, trust_region=1e-4),
        batches_of(60, vocabulary=vocabulary),
    )

    @torch.no_grad()
    def logp() -> list[torch.Tensor]:
        return [(student.logits(batch).double() / temperature).log_softmax(-1) for batch in batches]

    before = logp()
    out = student.update(batches, Objective(student_temperature=temperature))
    pairs = zip(before, logp(), batches, strict=True)
    actual = sum(float(b.token_weights.double() @ (p.exp() * (p - now)).sum(-1)) for p, now, b in pairs)
    assert actual == pytest.approx(out.metrics["natural/predicted_kl"], rel=0.05)


def test_chosen_parameters_move_and_the_others_do_not(model):
    student = student_of(model, parameters=r"layers\.1\.|norm")
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    student.update(batches_of(40), Objective())
    assert len(student.parameters()) == sum("layers.1." in name or "norm" in name for name in before)
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("layers.1." in name or "norm" in name), name


def test_a_pattern_that_fits_nothing_is_refused_with_some_names(model):
    with pytest.raises(ConfigError, match=r"fits none of the student's \d+ trainable parameters.*embed_tokens"):
        student_of(model, parameters="layer_7")


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(model, monkeypatch):
    student = student_of(model, damping=0.0, weight_decay=0.1)
    before = flat(student)
    logits = student._exact_logits
    monkeypatch.setattr(student, "_exact_logits", lambda batch: logits(batch) * math.inf)
    with pytest.raises(NonFiniteError, match=r"weights were not changed.*damping"):
        student.update(batches_of(10_000), Objective())
    assert torch.equal(flat(student), before)
    assert student.version == 0


def test_a_run_that_stops_and_resumes_is_bit_for_bit_the_uninterrupted_one(world, tmp_path):
    values = settings(world, tmp_path / "whole", **NATURAL, optimizer__schedule="linear", checkpoint__every=2)
    train(build(merge({}, values)))
    values["run_dir"] = str(tmp_path / "stopped")
    train(build(merge({}, values)))
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000008")
    shutil.rmtree(tmp_path / "stopped" / "student")  # as a kill in step 7 leaves it
    train(build(merge({}, values)), resume=True)
    ours, theirs = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [
        [{k: v for k, v in r.metrics.items() if not k.startswith("time/")} for r in read_metrics(tmp_path / n)]
        for n in ("stopped", "whole")
    ]
    assert rows[0] == rows[1]


def test_a_run_records_its_steps_and_reports_them(world, tmp_path, capsys):
    config = config_of(world, tmp_path, train__steps=4, eval__every=0, log__progress="plain")
    rows = run_steps(config)
    names = {"natural/predicted_kl", "natural/scale", "natural/residual", "natural/iterations"}
    assert all(names <= row.keys() for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "step KL 0.1" in capsys.readouterr().out
    assert "Natural-gradient step" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn_also_on_a_bfloat16_student(world, tmp_path, dtype):
    more = {"student__lora__rank": 4, "student__dtype": dtype, "eval__every": 0}
    rows = run_steps(config_of(world, tmp_path, **more))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    start = AutoModelForCausalLM.from_pretrained(world / "student", dtype=dtype).state_dict()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", dtype=dtype).state_dict()
    assert torch.equal(start["model.embed_tokens.weight"], final["model.embed_tokens.weight"])


REFUSED = [
    ({"optimizer__lr": 2.0}, "out of its trust region"),
    ({"optimizer__max_grad_norm": 1.0}, "whose length the trust region bounds"),
    ({"optimizer__natural_gradient__damping": -0.1}, "damping must be a positive number"),
    ({"optimizer__natural_gradient__trust_region": 0.0}, "trust_region must be a positive number"),
    ({"optimizer__natural_gradient__iterations": 0}, "iterations must be at least 1"),
    ({"optimizer__natural_gradient__parameters": "layers.("}, "is not a regular expression"),
    ({"optimizer__name": "adamw", "optimizer__natural_gradient__damping": 0.1}, "optimizer.name=natural_gradient, and"),
    ({"student__gradient_checkpointing": True}, "keep_graphs=false"),
    ({"student__attn_implementation": "flash_attention_2"}, "natural_gradient needs two"),
    ({"student__dtype": "bfloat16"}, "student.lora.rank=32"),
    ({"student__dtype": "float16", "student__lora__rank": 4}, "Use bfloat16 with the same adapters"),
]


@pytest.mark.parametrize(("more", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_cannot_work_is_refused_with_what_to_do(world, tmp_path, more, why):
    with pytest.raises(ConfigError, match=why):
        config_of(world, tmp_path, **more)


SAMPLED = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
WARNED = [
    ({"rl__weight": 1.0}, "with a reward: the solver magnifies the noise"),
    (SAMPLED, "with the sampled token: the solver magnifies the noise"),
    ({"optimizer__lr": 2e-3}, "optimizer.lr=0.002 is a factor of every natural-gradient step"),
    ({"train__token_fraction": 0.5}, "counts the kept tokens alone"),
]


@pytest.mark.parametrize(("more", "what"), WARNED, ids=[what for _, what in WARNED])
def test_what_is_probably_not_meant_is_said(world, tmp_path, more, what):
    assert any(what in notice for notice in notices(config_of(world, tmp_path, **more)))
    assert not notices(config_of(world, tmp_path))
    assert not any("natural" in n for n in notices(config_of(world, tmp_path, optimizer__name="adamw", **SAMPLED)))


def test_other_optimizers_keep_their_defaults():
    adamw, natural = OptimizerConfig(), OptimizerConfig(name="natural_gradient")
    assert (adamw.peak_lr, adamw.warmup, adamw.gradient_limit) == (1e-5, 10, 1.0)
    assert (natural.peak_lr, natural.warmup, natural.gradient_limit) == (1.0, 0, 0.0)


@pytest.mark.endurance
@pytest.mark.slow
def test_on_the_demo_ten_steps_beat_adamw_s_best_rate(tmp_path):
    """Seed 0 of the five of benchmarks/LOG.md."""
    prepare(tmp_path, seed=0, say=lambda _: None)
    files = {"student": "base", "teacher": "teacher"}
    places = {f"{who}.model": str(tmp_path / name) for who, name in files.items()}
    places |= {"prompts.path": str(tmp_path / "train.jsonl"), "prompts.eval_path": str(tmp_path / "eval.jsonl")}
    quick = {"train.steps": 10, "eval.every": 0, "checkpoint.every": 0, "optimizer.schedule": "constant"}

    def last_loss(run: str, **optimizer: object) -> float:
        own = {f"optimizer.{key}": value for key, value in optimizer.items()} | {"run_dir": str(tmp_path / run)}
        config = build(merge(read_recipe(recipe_path()), places | quick | own | {"log.progress": "off"}))
        return run_steps(config)[-1]["loss"]

    natural = last_loss("natural", name="natural_gradient", lr=None, warmup_steps=None)
    adamw = {lr: last_loss(f"adamw-{lr}", lr=lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)}
    assert natural < MARGIN * min(adamw.values()), json.dumps({"natural": natural, **adamw})
