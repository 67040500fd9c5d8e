"""The doctor's look at a teacher's scores: healthy ones are green, and those that belong to other tokens or models are red."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from doctor.pairs import EOS, LETTERS, SIZE, TOKENIZER, answering, bigram_lm, by_name, config_of, write_pair
from opd.data.rendering import Renderer
from opd.doctor.alignment import check_alignment
from opd.doctor.check import Check
from opd.losses import to_logp
from opd.samplers.base import Sampling, draw
from opd.samplers.hf import HfSampler
from opd.serving.frozen import FrozenModel
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import tiny_causal_lm
from opd.trainer.examine import examine
from opd.trainer.from_config import Given
from opd.types import DenseTarget, HiddenTarget, Prompt, Rollout, Target, TargetKind
from remote.scripted import serving as serving_scripted
from served import freeze_model, serving
from teachers.model_server import ModelServer

VOCABULARY = VocabularyMatch(size=SIZE)
PROMPTS = [Prompt(index=i, text=letter) for i, letter in enumerate(LETTERS[:4])]


class Shifted(LocalTeacher):
    """Row t holds what belongs to row t − `by`."""

    by = 0

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[Target]:
        return [_rolled(target, self.by) for target in super().score(rollouts, kind)]


class TopKOnly(Shifted):
    """As a server that sends log-probs of its likeliest tokens."""

    exact_kind = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, *args: Any, kinds: set[TargetKind], **more: Any) -> None:
        super().__init__(*args, **more)
        self.exact_kind = None  # pyright: ignore[reportAttributeAccessIssue]
        self.supplies = frozenset(kinds)
        self.top_k = 4


def _rolled(target: Any, by: int) -> Any:
    tensors = {f.name: getattr(target, f.name) for f in fields(target)}
    rolled = {name: torch.roll(t, by, 0) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return dataclasses.replace(target, **rolled)


def teacher_of(model: Any, kind: type[Shifted] = Shifted, by: int = 0, **more: Any) -> Shifted:
    teacher = kind(
        model, Renderer(TOKENIZER, name="tiny"), vocabulary=VOCABULARY, pad_id=TOKENIZER.pad_token_id, **more
    )
    teacher.by = by
    return teacher


def greedy(model: Any, length: int = 8) -> list[Rollout]:
    sampler = HfSampler(
        model,
        Renderer(TOKENIZER, name="tiny"),
        Sampling(max_new_tokens=length, temperature=0.0),
        eos_ids=(EOS,),
        pad_id=TOKENIZER.pad_token_id,
        vocabulary=VOCABULARY,
    )
    return draw(sampler, PROMPTS, 1, seed=0)


def logps(model: Any, answers: Sequence[Rollout]) -> list[torch.Tensor]:
    targets = teacher_of(model).score(answers, "dense")
    assert all(isinstance(target, DenseTarget) for target in targets)
    return [
        to_logp(target.logits).gather(-1, torch.tensor(answer.response_ids)[:, None])[:, 0]
        for target, answer in zip(targets, answers, strict=True)
        if isinstance(target, DenseTarget)
    ]


def judged(teacher: Shifted, student: Any, *, own: bool = True, room: int = 8) -> Check:
    answers = greedy(teacher.model if own else student)
    return check_alignment(teacher, answers, logps(student, answers), own=own, room=room)


def repeating() -> Any:
    """Its answers are one token again and again, which says nothing about a shift."""
    table = torch.full((SIZE, SIZE), 0.1 / SIZE)
    table[:, 1] += 0.9
    for digit in range(2, 10):  # which never occur in an answer
        table[digit] = torch.full((SIZE,), 0.1 / SIZE)
        table[digit, digit] += 0.9
    return bigram_lm(table)


def random_lm(seed: int, architecture: Any = "qwen3") -> Any:
    return tiny_causal_lm(
        TOKENIZER, architecture=architecture, hidden=32, layers=2, max_positions=64, seed=seed, initializer_range=0.3
    )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_random_models_that_score_rightly_are_green(architecture: str, own: bool):
    for seed in range(4):
        teacher, student = random_lm(seed, architecture), random_lm(seed, architecture)
        check = judged(teacher_of(teacher), student, own=own)
        assert check.verdict == "green", (seed, check)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("own", [True, False])
def test_scores_that_are_shifted_by_one_are_red(by: int, own: bool):
    for seed in range(4):
        check = judged(teacher_of(random_lm(seed), by=by), random_lm(seed), own=own)
        assert check.verdict == "red" and "shifted" in check.seen, (seed, check)
        assert not own or f"fit the token {'before' if by == 1 else 'after'} better" in check.seen, (seed, check)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("kinds", [{"top_k"}, {"sampled"}, {"top_k", "sampled"}])
def test_a_shift_is_seen_in_log_probs_of_few_tokens(by: int, kinds: set[TargetKind]):
    model = random_lm(3)
    assert judged(teacher_of(model, TopKOnly, kinds=kinds), model).verdict == "green"
    shifted = judged(teacher_of(model, TopKOnly, by=by, kinds=kinds), model)
    assert shifted.verdict == "red" and "shifted" in shifted.seen


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shift_is_seen_in_answers_that_repeat_one_token(by: int):
    model = repeating()
    assert len({token for answer in greedy(model) for token in answer.response_ids}) == 1
    assert judged(teacher_of(model), model).verdict == "green"
    check = judged(teacher_of(model, by=by), model)
    assert check.verdict == "red" and "token 3 of a response do" in check.seen


def test_no_more_tokens_are_probed_than_an_answer_may_have():
    """A prompt that leaves room for six tokens is probed with six, and one that leaves room for less is not probed."""

    class Narrow(Shifted):
        longest = 0

        def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[Target]:
            Narrow.longest = max(len(rollout.response_ids) for rollout in rollouts)
            return super().score(rollouts, kind)

    model = repeating()
    shifted = teacher_of(model, Narrow, by=1)
    for room, verdict in ((5, "green"), (6, "red"), (7, "red"), (8, "red"), (20, "red")):
        answers = [dataclasses.replace(a, response_ids=a.response_ids[: min(room, 5)]) for a in greedy(model)]
        assert check_alignment(shifted, answers, logps(model, answers), own=True, room=room).verdict == verdict
        assert Narrow.longest == min(8, room)


@pytest.mark.parametrize(("right", "verdict"), [(0.2, "green"), (0.02, "red")])
def test_a_teacher_that_gives_its_own_answers_far_less_than_the_student_does_is_red(right: float, verdict: str):
    """The weights that score are not those that answered. One token in two has another probability."""
    model, other = bigram_lm(answering(0.95)), bigram_lm(answering(right))
    answers = greedy(model)
    check = check_alignment(teacher_of(other), answers, logps(model, answers), own=True, room=8)
    apart = check.numbers["student's log-prob"] - check.numbers["teacher's log-prob"]  # pyright: ignore[reportOperatorIssue]
    rest = 0.02 / SIZE
    assert apart == pytest.approx(0.5 * math.log((0.98 * 0.95 + rest) / (0.98 * right + rest)), abs=1e-3)
    assert check.verdict == verdict


def test_a_model_that_finds_the_answers_less_likely_than_guessing_is_red():
    table = answering(0.95).flip(0)
    right = bigram_lm(answering(0.95))
    check = judged(teacher_of(bigram_lm(table)), right, own=False)
    assert check.verdict == "red" and "guessing" in check.seen


def test_a_teacher_object_with_shifted_scores_is_red_before_any_step(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering(), teacher__model="an object")
    given = Given(teachers={"teacher": teacher_of(bigram_lm(answering()), by=1)})
    found = by_name(examine(config_of(values), given=given))
    assert found["alignment"].verdict == "red" and "shifted" in found["alignment"].seen
    assert found["stop mass"].verdict == found["start/task"].verdict == "skipped"


@dataclass(frozen=True, kw_only=True)
class Late(FrozenModel):
    """A server whose rows are one place too late."""

    def outputs(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [torch.roll(rows, 1, 0) for rows in super().outputs(prompts, responses)]


@pytest.mark.parametrize("late", [False, True])
def test_a_teacher_behind_opd_serve_teacher_is_looked_at_through_its_scores(tmp_path: Path, late: bool):
    model = freeze_model(bigram_lm(answering()), TOKENIZER)
    if late:
        model = Late(**{item.name: getattr(model, item.name) for item in fields(FrozenModel)})
    with serving(model) as server:
        values = write_pair(tmp_path, answering(0.4), answering(), teacher__model="", teacher__dtype="float32")
        found = by_name(examine(config_of(values | {"teacher.url": [server.url], "teacher.api": "opd"})))
    assert found["alignment"].verdict == ("red" if late else "green")
    assert found["alignment"].numbers["answers"] == "the student's"
    assert found["start/task"].verdict == "skipped"
    assert late or not [name for name, check in found.items() if check.verdict == "red"]


def test_a_teacher_behind_an_inference_server_is_looked_at_too(tmp_path: Path):
    with serving_scripted(ModelServer(bigram_lm(answering()), TOKENIZER)) as (server,):
        values = write_pair(
            tmp_path,
            answering(0.4),
            answering(),
            teacher__model="",
            objective__support="teacher_top_k",
            objective__top_k=4,
        )
        found = by_name(examine(config_of(values | {"teacher.url": [server.url]})))
    assert found["alignment"].verdict == "green", found["alignment"]
    mean, low, high = found["start/distance"].numbers["reverse KL"]  # pyright: ignore[reportGeneralTypeIssues]
    assert 0 < low < mean < high


def test_hidden_states_are_what_a_local_teacher_is_looked_at_by():
    (target,) = teacher_of(random_lm(0)).score(greedy(random_lm(0))[:1], None)
    assert isinstance(target, HiddenTarget)
