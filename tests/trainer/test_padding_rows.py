"""A sampler of somebody's own may draw rows that pad the output layer: such a token is left out and counted, and nothing breaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd.config import Config, OptimizerConfig
from opd.config.recipe import build, merge
from opd.data.rendering import Renderer
from opd.losses import Objective
from opd.models import response_logits
from opd.samplers.base import Sampling
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, random_rollout, tiny_causal_lm
from opd.trainer.evaluate import Evaluator
from opd.trainer.scoring import StepScorer
from opd.trainer.student import Student
from opd.types import DenseTarget, Prompt, Rollout
from worlds import make_world, settings

PADDING = 280
TOKENS = 258
SAMPLED = Objective(support="sampled", estimator="k1", delivery="advantage")


def models(teacher_rows: int) -> tuple[Student, LocalTeacher]:
    tokenizer = byte_tokenizer()
    vocabulary = VocabularyMatch(size=TOKENS)
    learner, expert = (
        tiny_causal_lm(tokenizer, vocab_size=rows, seed=seed, initializer_range=0.2, max_positions=64)
        for seed, rows in enumerate((300, teacher_rows))
    )
    teacher = LocalTeacher(expert, Renderer(tokenizer, name="byte"), vocabulary=vocabulary, pad_id=256)
    student = Student(
        learner,
        OptimizerConfig(lr=1e-3),
        vocabulary=vocabulary,
        eos_ids=(257,),
        teacher_logits=teacher.logits,
        total_steps=10,
    )
    return student, teacher


def rollouts(teacher: LocalTeacher, *, position: int) -> list[Rollout]:
    """Two responses of 9 and 6 tokens, with a padding row in the first."""
    found = []
    for i, length in enumerate((9, 6)):
        prompt = Prompt(index=i, text="question"[: 3 + i])
        drawn = random_rollout(1, length, 256, seed=i)
        ids = [PADDING if i == 0 and t == position else token for t, token in enumerate(drawn.response_ids)]
        found.append(
            dataclasses.replace(
                drawn, prompt=prompt, prompt_ids=teacher.renderer.prompt_ids(prompt), response_ids=tuple(ids), id=i
            )
        )
    return found


def scorer(config: Config, teacher: LocalTeacher) -> StepScorer:
    return StepScorer(
        objective=config.objective, rl=config.rl, train=config.train, teacher=teacher, kind=teacher.kind,
        reinforcement=None, pad_id=256, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    world = make_world(tmp_path_factory.mktemp("world"))
    return build(merge({}, settings(world, world / "run", train__tokens_per_microbatch=9999)))


@pytest.mark.parametrize("objective", [Objective(), SAMPLED], ids=["full", "sampled"])
@pytest.mark.parametrize(("teacher_rows", "heard"), [(320, 14), (TOKENS, 9)], ids=["read on", "not read"])
def test_it_is_left_out_with_what_no_teacher_could_read(
    config: Config, objective: Objective, teacher_rows: int, heard: int
):
    student, teacher = models(teacher_rows)
    teacher.bind_objective(objective)
    config = dataclasses.replace(config, objective=objective)
    drawn = rollouts(teacher, position=3)
    scored = scorer(config, teacher).score(drawn, 0)
    assert scored.metrics["unheard_tokens"] == 15 - heard
    kept = torch.ones(15, dtype=torch.bool)
    kept[3 : 4 if heard == 14 else 9] = False
    ((batch,),) = (scored.batches,)
    with torch.no_grad():
        logits = response_logits(student.model, batch.sequences)[:, :TOKENS]
        cut = [dataclasses.replace(r, response_ids=tuple(min(t, 257) for t in r.response_ids)) for r in drawn]
        read = drawn if teacher_rows > PADDING else cut
        said = torch.cat([teacher.logits(target) for target in teacher.score(read, "hidden")])[kept]  # pyright: ignore[reportArgumentType]
        ids = torch.tensor([t for r in drawn for t in r.response_ids])[kept]
        expected, _ = objective.per_token_loss(logits, DenseTarget(logits=said), ids, sampler_logp=batch.sampler_logp)
    out = student.update(scored.batches, scored.objective)
    assert len(logits) == heard and out.loss == pytest.approx(float(expected.mean()), rel=1e-4)


def test_without_one_nothing_is_left_out(config: Config):
    _, teacher = models(TOKENS)
    teacher.bind_objective(Objective())
    scored = scorer(config, teacher).score(rollouts(teacher, position=-1), 0)
    assert "unheard_tokens" not in scored.metrics and all(b.kept is None for b in scored.batches)


def test_an_evaluation_reads_it_as_any_other(config: Config):
    student, teacher = models(TOKENS)
    teacher.bind_objective(Objective())
    evaluator = Evaluator(
        prompts=(), samples_per_prompt=1, scorer=None, teacher=teacher, teacher_logp_floor=None,  # pyright: ignore[reportArgumentType]
        sampling=Sampling(max_new_tokens=9), extra_temperatures=(), layout="right_padded", tokens_per_microbatch=9999, pad_id=256, seed=0,
        measure="own",
    )  # fmt: skip
    rows = evaluator._nats(rollouts(teacher, position=3), student, teacher)["reverse_kl"]
    assert [len(row) for row in rows] == [9, 6] and all(value >= 0 for row in rows for value in row)
