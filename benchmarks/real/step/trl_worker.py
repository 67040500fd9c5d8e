"""One timed run of TRL's DistillationTrainer on the real model. It runs in TRL's environment (benchmarks/trl_environment.py), where of
opd only the losses can be imported. `python -m benchmarks.real.step.trl_worker CASE RESULT`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.loop.clock import Case, StepClock, read_case
from benchmarks.real.step.machine import ProductTypes, peak_bytes, rates
from benchmarks.trl_environment import ON_CPU, versions
from opd.losses import reverse_kl, to_logp

AT_ONCE = 64  # rows whose logits are compared at a time


def main(case_path: str, result_path: str) -> None:
    import datasets
    from trl import DistillationTrainer  # pyright: ignore[reportMissingImports]

    case = read_case(case_path)
    torch.set_num_threads(case.threads)
    measured, clock = rates(), StepClock()
    load = AutoModelForCausalLM.from_pretrained
    rows = map(json.loads, Path(case.data).read_text("utf-8").splitlines())
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = DistillationTrainer(
            model=load(case.student, dtype=torch.float32),
            teacher_model=load(case.teacher, dtype=torch.float32),
            args=arguments(case, run_dir),
            processing_class=AutoTokenizer.from_pretrained(case.student),
            train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        )
        watch = Watch(trainer, clock)
        trainer.add_callback(watch)
        trainer.train()
    clock.write(
        result_path,
        prompts=watch.prompts,
        versions=versions(),
        lengths=watch.lengths,
        peak_bytes=peak_bytes(),
        products=watch.types.text(),
        same_batch=watch.same_batch,
        **measured,
    )


def arguments(case: Case, run_dir: str) -> Any:
    """The case in TRL's words. What is not named is TRL's default, but for what its defaults would add to the work (ON_CPU)."""
    from trl import DistillationConfig  # pyright: ignore[reportMissingImports]

    rows = case.rows_at_once or case.rollouts_per_step
    return DistillationConfig(
        output_dir=run_dir,
        beta=1.0,
        temperature=1.0,
        max_completion_length=case.max_new_tokens,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=case.rollouts_per_step // rows,
        max_steps=case.steps,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        seed=case.seed,
        **{**ON_CPU, "bf16": case.bfloat16},
    )


class Watch(TrainerCallback):
    """Times the parts of DistillationTrainer's step from outside, and notes what it worked on."""

    def __init__(self, trainer: Any, clock: StepClock) -> None:
        from trl.trainer import distillation_trainer  # pyright: ignore[reportMissingImports]

        self.clock, self.types = clock, ProductTypes(clock)
        self.prompts: list[list[int]] = []
        self.lengths: list[list[tuple[int, int]]] = []
        self.same_batch: tuple[float, float] | None = None
        """TRL's and opd's reverse KL (nats per token) of the first forward pass, from the same hidden states."""
        self._loss = 0.0
        self._generate = trainer._generate
        self._divergence = distillation_trainer._chunked_divergence_loss
        trainer._generate = self.generate
        distillation_trainer._chunked_divergence_loss = self.divergence
        trainer._generate_and_score_completions = clock.wrap(trainer._generate_and_score_completions, "rollout")
        teacher = trainer.teacher_model
        teacher.base_model.forward = clock.wrap(teacher.base_model.forward, "teacher")
        self.types.watch(trainer.model)
        self.types.watch(teacher)

    def generate(self, prompts: Any) -> Any:
        out = self._generate(prompts)
        self.prompts += out[0]
        self.lengths.append([(len(p), len(r)) for p, r in zip(out[0], out[1], strict=True)])
        return out

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor, *rest: Any, **options: Any) -> Any:
        """TRL's loss of hidden states; `rest` starts with both output layers' weights and the mask of what counts."""
        out = self._divergence(student, teacher, *rest, **options)
        self._loss += out[0].item()
        if self.same_batch is None:
            heads, mask = rest[:2], rest[2] != 0
            count = float(options["num_items_in_batch"])
            own = _reverse_kl((student.detach()[mask], teacher[mask]), heads) / count
            self.same_batch = (out[0].item(), own)
        return out

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.clock.steps:
            self.clock.restart()  # loading and set-up are not part of the first step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step = self.lengths[-1]
        self.clock.step(rollouts=len(step), tokens=sum(response for _, response in step), loss=self._loss)
        self._loss = 0.0


@torch.no_grad()
def _reverse_kl(hidden: tuple[torch.Tensor, torch.Tensor], heads: Any) -> float:
    """opd's reverse KL in float64, summed over rows."""
    total = 0.0
    own, theirs = (head.double().T for head in heads)
    with torch.autocast("cpu", enabled=False):
        for student, teacher in zip(*(states.double().split(AT_ONCE) for states in hidden), strict=True):
            total += reverse_kl(to_logp(student @ own), to_logp(teacher @ theirs)).sum().item()
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
