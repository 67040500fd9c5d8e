"""A teacher of somebody's own, as a client of a scoring server would be: this file, and nothing of ours but the nouns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import opd
from opd.testing import digit_tokenizer, tiny_causal_lm

TOKENIZER = digit_tokenizer()
ROWS = [{"prompt": f"{n}>", "answer": str(n)} for n in range(10, 40)]


def teacher_model() -> Any:
    return tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2, initializer_range=0.4)


class Server:
    """Reads prompt and response one rollout at a time, and says what it was asked for."""

    name = "a server"
    vocabulary = opd.VocabularyMatch(size=len(TOKENIZER))
    rows = len(TOKENIZER)

    def __init__(self, *supplies: str) -> None:
        self.supplies = frozenset(supplies)
        self.exact_kind = "dense" if "dense" in supplies else None
        self.model = teacher_model()

    def bind_objective(self, objective: opd.Objective) -> Any:
        return objective.check_supplies(self.supplies, self.name)  # pyright: ignore[reportArgumentType]

    def groups(self, rollouts: Sequence[opd.Rollout]) -> Mapping[str, Sequence[int]]:
        return {"": range(len(rollouts))}

    @torch.no_grad()
    def score(self, rollouts: Sequence[opd.Rollout], kind: str) -> list[Any]:
        targets = []
        for rollout in rollouts:
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            logits = self.model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            said = logits.log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1)
            targets.append(opd.DenseTarget(logits=logits) if kind == "dense" else opd.SampledTarget(teacher_logp=said))
        return targets

    def logits(self, target: opd.HiddenTarget) -> torch.Tensor:
        raise NotImplementedError("it supplies no hidden states")

    def context(self) -> AbstractContextManager[None]:
        return nullcontext()


def trained(teacher: Any, run_dir: Path, **more: Any) -> list[dict[str, float]]:
    student = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1, initializer_range=0.4)
    settings: dict[str, Any] = {
        "rollout": {"max_new_tokens": 5},
        "train": {"steps": 4, "prompts_per_step": 6, "samples_per_prompt": 2},
        "optimizer": {"lr": 0.01, "warmup_steps": 0},
        "log": {"progress": "off"},
        "eval": {"every": 4},
        "eval_prompts": ROWS[:8],
    }
    distiller = opd.Distiller(
        student=(student, TOKENIZER), teacher=teacher, prompts=ROWS, run_dir=run_dir, **settings | more
    )
    return [dict(record.metrics, who=record.who) for record in distiller.train().metrics]  # pyright: ignore[reportReturnType]


def numbers(rows: list[dict[str, float]], *names: str) -> list[list[float]]:
    return [[row[name] for name in names] for row in rows if "loss" in row]


SAMPLED = opd.Objective(support="sampled", estimator="k1", delivery="advantage")


@pytest.mark.parametrize(("supplies", "objective"), [("sampled", SAMPLED), ("dense", opd.Objective())])
def test_it_teaches_as_a_model_of_the_same_weights_does(tmp_path: Path, supplies: str, objective: opd.Objective):
    served = trained(Server(supplies), tmp_path / "served", objective=objective)
    local = trained((teacher_model(), TOKENIZER), tmp_path / "local", objective=objective)
    mine, theirs = (numbers(rows, "loss", "teacher_logp", "grad_norm") for rows in (served, local))
    assert len(mine) == 4 and torch.allclose(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=1e-5)


def test_evaluations_compare_with_a_whole_distribution_and_else_report_the_reward_alone(tmp_path: Path):
    more: dict[str, Any] = {
        "train": {"steps": 12, "prompts_per_step": 12, "samples_per_prompt": 2},
        "eval": {"every": 12, "samples_per_prompt": 4},
        "eval_prompts": ROWS,
    }
    exact = [r for r in trained(Server("dense"), tmp_path / "dense", **more) if "accuracy" in r]
    partial = [
        r for r in trained(Server("sampled"), tmp_path / "sampled", objective=SAMPLED, **more) if "accuracy" in r
    ]
    assert len(exact) == len(partial) == 2, "before the first step and after the last; the teacher itself draws nothing"
    assert exact[-1]["reverse_kl"] < exact[0]["reverse_kl"] and all("reverse_kl" not in row for row in partial)


def test_one_that_cannot_feed_the_objective_is_refused(tmp_path: Path):
    with pytest.raises(opd.OpdError, match="a server"):
        trained(Server("sampled"), tmp_path / "run")


def test_it_mixes_with_a_model(tmp_path: Path):
    teachers = {"server": Server("dense"), "model": (teacher_model(), TOKENIZER)}
    mixed = trained(None, tmp_path / "run", teachers=teachers, mixture="probability")
    alone = trained((teacher_model(), TOKENIZER), tmp_path / "alone")
    assert torch.allclose(
        torch.tensor(numbers(mixed, "loss")), torch.tensor(numbers(alone, "loss")), rtol=1e-3, atol=1e-5
    )
    assert mixed[1]["teacher/server/weight"] == 0.5


def test_one_with_members_missing_is_refused_at_once(tmp_path: Path):
    class Half:
        name = "half"

        def score(self, rollouts: object, kind: str) -> list[object]:
            return []

    with pytest.raises(opd.OpdError, match=r"teacher is a Half without supplies, .*context, which opd\.Teacher has"):
        trained(Half(), tmp_path / "run")


@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_one_that_scores_too_few_rollouts_is_refused(tmp_path: Path, kind: str):
    teacher = Server(kind)
    score = teacher.score
    teacher.score = lambda rollouts, kind: score(rollouts, kind)[:-1]
    objective = SAMPLED if kind == "sampled" else opd.Objective()
    with pytest.raises(opd.OpdError, match=r"Server\.score returned \d+ targets for \d+ rollouts"):
        trained(teacher, tmp_path / "run", objective=objective)
