"""A sampler of somebody's own, as a client of an inference server would be: this file, and nothing of ours but the nouns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import opd
from opd.testing import digit_tokenizer, tiny_causal_lm

TOKENIZER = digit_tokenizer()
ROWS = [{"prompt": f"{n}>", "answer": str(n)} for n in range(10, 40)]


class Server:
    """Samples token by token from a copy of the weights, which `load` renews: a server shares no memory with the trainer."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.limits: list[int] = []

    def load(self, student: Any) -> None:
        self.versions.append(student.version)
        self.model = copy.deepcopy(student.model)

    def limit(self, max_new_tokens: int) -> None:
        self.limits.append(max_new_tokens)

    @torch.no_grad()
    def sample(self, prompts: Sequence[opd.Prompt], *, seed: int) -> list[opd.Rollout]:
        generator = torch.Generator().manual_seed(seed)
        return [self._one(prompt, generator) for prompt in prompts]

    def _one(self, prompt: opd.Prompt, generator: torch.Generator) -> opd.Rollout:
        prompt_ids = tuple(TOKENIZER(prompt.text)["input_ids"])
        ids, logps = list(prompt_ids), []
        while len(logps) < self.limits[-1] and (not logps or ids[-1] != TOKENIZER.eos_token_id):
            logp = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logps.append(float(logp[ids[-1]]))
        response = ids[len(prompt_ids) :]
        return opd.Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response_ids=tuple(response),
            sampler_logp=tuple(logps),
            finished=response[-1] == TOKENIZER.eos_token_id,
            policy_version=self.versions[-1],
            text=TOKENIZER.decode(response, skip_special_tokens=True),
        )


def distiller(sampler: Any, run_dir: Path, **more: Any) -> opd.Distiller:
    student, teacher = (
        tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=seed, initializer_range=0.4) for seed in (1, 2)
    )
    settings: dict[str, Any] = {
        "rollout": {"max_new_tokens": 5},
        "train": {"steps": 4, "prompts_per_step": 6, "samples_per_prompt": 3},
        "optimizer": {"lr": 0.01, "warmup_steps": 0},
        "log": {"progress": "off"},
        "eval": {"every": 0},
    }
    return opd.Distiller(
        student=(student, TOKENIZER),
        teacher=(teacher, TOKENIZER),
        prompts=ROWS,
        sampler=sampler,
        run_dir=run_dir,
        **settings | more,
    )


def test_it_is_given_the_weights_of_every_step(tmp_path: Path):
    server = Server()
    run = distiller(server, tmp_path / "run").train()
    steps = [record.metrics for record in run.metrics if record.kind == "step"]
    assert server.versions == [0, 1, 2, 3, 4] and server.limits == [5] * 4
    assert all(step["sampler_student_gap"] < 1e-5 for step in steps), "the samples are of the student's own weights"
    assert steps[-1]["reverse_kl"] < 0.9 * steps[0]["reverse_kl"]


def test_one_that_ignored_them_would_be_seen(tmp_path: Path):
    server = Server()
    load = server.load
    server.load = lambda student: load(student) if student.version == 0 else None
    run = distiller(server, tmp_path / "run").train()
    assert run.metrics[-1].metrics["sampler_student_gap"] > 0.01


def test_its_rollouts_are_compared_within_their_prompts(tmp_path: Path):
    """GRPO: ids and groups are the trainer's to set, whatever the sampler put there."""
    made = distiller(
        Server(),
        tmp_path / "run",
        rl={"weight": 1.0},
        reward=lambda prompt, response: float(response[:1] == prompt.answer[0]),
    )
    parts = made.components
    from opd.samplers.base import draw

    parts.sampler.load(parts.student)
    parts.sampler.limit(5)
    rollouts = draw(parts.sampler, parts.schedule.take(0, 6), 3, seed=1)
    assert [r.id for r in rollouts] == list(range(18)) and [r.group for r in rollouts] == [i // 3 for i in range(18)]
    said = parts.scorer.reinforcement.advantages(rollouts[::-1])
    sums = dict.fromkeys(range(6), 0.0)
    for rollout, advantage in zip(rollouts[::-1], said.per_token, strict=True):
        sums[rollout.group] += float(advantage[0])
    assert any(float(a[0]) != 0 for a in said.per_token) and all(abs(total) < 1e-5 for total in sums.values())


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: r[::-1]], ids=["one too few", "another order"])
def test_one_that_answers_other_prompts_is_refused(tmp_path: Path, change: Any):
    server = Server()
    sample = server.sample
    server.sample = lambda prompts, seed: change(sample(prompts, seed=seed))
    with pytest.raises(opd.OpdError, match=r"Server\.sample returned .* one per prompt, in order"):
        distiller(server, tmp_path / "run").step()


def test_an_object_that_is_no_sampler_is_refused_at_once(tmp_path: Path):
    with pytest.raises(opd.OpdError, match=r"sampler is a object without sample, load, limit, which opd\.Sampler has"):
        distiller(object(), tmp_path / "run")
