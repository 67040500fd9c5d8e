"""The reverse-KL arm through the product's own trainer: `opd.Distiller` on the benchmark's task, weights and prompts.

The decoder's weights are in transformers' GPT-2, prompts are text, and `Distiller.step` samples, scores and updates. AdamW, because
Muon would see GPT-2's query, key and value as one matrix. `Distiller` runs twice for every seed: once sampling for itself, and once on
what the benchmark's sampler draws from its weights, which separates luck in sampling from everything else. The benchmark's loop on
other random numbers shows how large that luck is.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import opd
from benchmarks.convergence.gpt2 import CHARACTERS, decoder_of, gpt2, texts
from benchmarks.convergence.model import Shape, TinyDecoder
from benchmarks.convergence.outside import LEVELS, STOP, OutsideRun, Trainer, apart, finished, line, over, own_run
from benchmarks.convergence.store import Setting, Store, one_thread
from benchmarks.convergence.task import accuracy
from benchmarks.convergence.train import EVALUATE_EVERY, Curve, Job, step_prompts, train
from benchmarks.convergence.world import World, world
from opd.samplers.base import SampledStudent
from opd.types import Prompt, Rollout

ARM = ("reverse_kl", "adamw")
LOOP, DISTILLER, REPLAY = "the benchmark's loop", "opd.Distiller", "opd.Distiller, the benchmark's samples"
DRAWS = {f"{LOOP}, other samples {draw}": draw for draw in (1, 2, 3, 4)}
TITLE = "## The same arm through opd.Distiller"


def trainers(runs: Store) -> dict[str, Trainer]:
    """The benchmark's own loop, the trainer that users have, and what explains their difference."""
    return {
        LOOP: partial(own_run, runs, name=LOOP),
        DISTILLER: distil,
        REPLAY: partial(distil, own_draws=False),
        **{name: partial(redrawn, name=name, draw=draw) for name, draw in DRAWS.items()},
    }


def redrawn(setting: Setting, *, name: str, draw: int) -> OutsideRun:
    """The setting through the benchmark's loop, with other samples for the same prompts."""
    one_thread()
    there = world(setting.cell, setting.seed)
    job = replace(setting.job(there.level(STOP / 100)), draw=draw)
    run = train(job, copy.deepcopy(there.base), there.teachers, there.held)
    return finished(name, setting, run.curve, run.seconds_per_step, "")


def table(runs: Sequence[OutsideRun]) -> str:
    """Updates to the levels, and the ratio to the benchmark's own over the seeds that both have."""
    by = {name: [r for r in runs if r.trainer == name] for name in (LOOP, DISTILLER, REPLAY, *DRAWS)}
    if not all(by.values()):
        return ""
    values = runs[0].values
    base, teacher = ([r.number(n) for r in by[LOOP]] for n in ("base_accuracy", "teacher_accuracy"))
    head = (
        f"{TITLE}\n\nReverse KL, AdamW at {values['lr']}, {values['rollouts']} rollouts a step: updates to a share of the teacher's gain, mean "
        "(lowest–highest); in square brackets the Distiller's over the loop's, with the 95 % interval, over seeds in pairs. All from one "
        f"set of bases ({min(base):.4f} to {max(base):.4f}) and teachers ({min(teacher):.3f} to {max(teacher):.3f}).\n"
    )
    columns = ["trainer", "seeds", *(f"{level} %" for level in LEVELS), "CPU s per step"]
    lines = [head, f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += [line(name, found, by[LOOP]) for name, found in by.items()]
    parts = [_verdict(by[DISTILLER], by[LOOP]), apart(by[LOOP], by[REPLAY], "the benchmark", "Distiller")]
    parts.append(_luck([by[name] for name in DRAWS], by[LOOP]))
    return "\n".join([*lines, *(f"\n{part}" for part in parts)])


def _verdict(found: Sequence[OutsideRun], loop: Sequence[OutsideRun]) -> str:
    ratios = {level: over(found, loop, level) for level in LEVELS}
    held = [f"{level} %" for level, r in ratios.items() if r is not None and r.low <= 1 <= r.high]
    where = "at every level" if len(held) == len(LEVELS) else f"only at {', '.join(held)}" if held else "at no level"
    return f"Distiller sampling for itself: the interval of the ratio holds 1 {where}."


def _luck(draws: Sequence[Sequence[OutsideRun]], loop: Sequence[OutsideRun]) -> str:
    """Range of the ratios of the loop on other random numbers to the loop."""
    each = {level: [r.value for runs in draws if (r := over(runs, loop, level)) is not None] for level in LEVELS}
    ranges = ", ".join(f"{min(v):.2f} to {max(v):.2f} at {level} %" for level, v in each.items() if v)
    return f"Other samples alone multiply the loop's updates by {ranges}."


def distil(setting: Setting, *, own_draws: bool = True) -> OutsideRun:
    """The setting through `opd.Distiller`; CPU seconds are of the updates, without evaluation."""
    one_thread()
    there = world(setting.cell, setting.seed)
    stop_at = there.level(STOP / 100)
    curve, spent = Curve(), 0.0
    curve.add(0, accuracy(there.base, there.held)[0])
    with tempfile.TemporaryDirectory() as folder:
        distiller = distiller_of(setting.job(), there, folder, own_draws=own_draws)
        for step in range(1, setting.max_steps + 1):
            started = time.process_time()
            distiller.step()
            spent += time.process_time() - started
            if step % max(1, step // EVALUATE_EVERY) == 0 or step == setting.max_steps:
                student = decoder_of(distiller.components.student.model, there.base.shape)
                curve.add(step, accuracy(student, there.held)[0])
                if curve.values[-1] >= stop_at:
                    break
    name = DISTILLER if own_draws else REPLAY
    return finished(name, setting, curve, spent / curve.steps[-1], "")


def distiller_of(job: Job, there: World, folder: str, *, own_draws: bool = True) -> opd.Distiller:
    """The job as a user would write it from Python. Settings that are not named are the trainer's defaults. Without `own_draws` the
    benchmark's sampler draws, with its random numbers, from the weights that the student has at that update."""
    tokenizer = tokenizer_of_the_task()
    prompts = [{"prompt": p} for step in range(1, job.max_steps + 1) for p in texts(step_prompts(job, step)[0].ids)]
    return opd.Distiller(
        student=(gpt2(there.base), tokenizer),
        teacher=(gpt2(there.teachers[0]), tokenizer),
        prompts={"path": prompts, "shuffle": False},
        objective=job.method.objective,
        rollout={"max_new_tokens": job.digits},
        sampler=None if own_draws else BenchmarkSampler(job, there.base.shape),
        optimizer={"name": job.optimizer, "lr": job.lr, "warmup_steps": job.method.warmup, "schedule": job.schedule},
        train={"steps": job.max_steps, "prompts_per_step": job.rollouts, "samples_per_prompt": 1},
        eval={"every": 0},
        checkpoint={"every": 0},
        log={"progress": "off"},
        run_dir=folder,
        seed=job.seed,
    )


def tokenizer_of_the_task() -> PreTrainedTokenizerFast:
    """One token per character, and a row of the model for each. The other domain's separator, which no answer holds, is EOS: the
    trainer wants one that the model can say."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=CHARACTERS[-1], pad_token=CHARACTERS[-1])


class BenchmarkSampler:
    """An `opd.Sampler` that draws what the benchmark's loop would from the same weights. No token ends a response."""

    def __init__(self, job: Job, shape: Shape) -> None:
        self.job, self.shape = job, shape
        self.decoder: TinyDecoder | None = None
        self.version = 0

    def load(self, student: SampledStudent) -> None:
        self.decoder, self.version = decoder_of(student.model, self.shape), student.version

    def limit(self, max_new_tokens: int) -> None:
        assert max_new_tokens == self.job.digits

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        assert self.decoder is not None
        drawn, source = step_prompts(self.job, self.version + 1)
        assert [p.text for p in prompts] == texts(drawn.ids), "the prompts of this step are not the benchmark's"
        responses = self.decoder.sample(drawn.ids, 1, self.job.digits, source)
        return [
            Rollout(
                prompt=prompt,
                prompt_ids=tuple(ids),
                response_ids=tuple(response),
                sampler_logp=None,
                finished=False,
                policy_version=self.version,
                text=text,
            )
            for prompt, ids, response, text in zip(
                prompts, drawn.ids.tolist(), responses.tolist(), texts(responses), strict=True
            )
        ]
