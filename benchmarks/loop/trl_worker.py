"""One timed run of TRL's GKDTrainer. It runs in TRL's environment (benchmarks/trl_environment.py), where of opd only the
losses can be imported. `python -m benchmarks.loop.trl_worker CASE RESULT`, or `… --check RESULT` to compare the two losses."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.loop.clock import Case, StepClock, read_case
from benchmarks.trl_environment import ON_CPU, versions
from opd.losses import generalized_jsd, reverse_kl, to_logp, token_weights, weighted_sum

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def main(case_path: str, result_path: str) -> None:
    import datasets
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    case = read_case(case_path)
    torch.set_num_threads(case.threads)
    load = AutoModelForCausalLM.from_pretrained
    clock = StepClock()
    with tempfile.TemporaryDirectory() as run_dir:
        trainer = GKDTrainer(
            model=load(case.student, dtype=torch.float32),
            teacher_model=load(case.teacher, dtype=torch.float32),
            args=arguments(case, run_dir),
            processing_class=AutoTokenizer.from_pretrained(case.student),
            train_dataset=datasets.Dataset.from_list(conversations(case)),
        )
        watch = Watch(trainer, clock)
        trainer.add_callback(watch)
        trainer.train()
    clock.write(result_path, prompts=watch.prompts, versions=versions(), same_batch=watch.same_batch)


def conversations(case: Case) -> list[dict[str, Any]]:
    """GKD wants an answer in every row, and with lmbda=1 does not train on it."""
    rows = map(json.loads, Path(case.data).read_text().splitlines())
    return [{"messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}]} for row in rows]


def arguments(case: Case, run_dir: str) -> Any:
    """The case in TRL's words. What is not named is TRL's default, except what its defaults would add to the work: recomputing
    activations, bfloat16, logs and checkpoints are off."""
    from trl.experimental.gkd import GKDConfig  # pyright: ignore[reportMissingImports]

    return GKDConfig(
        output_dir=run_dir,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=case.max_new_tokens,
        per_device_train_batch_size=case.rollouts_per_step,
        max_steps=case.steps,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
        seed=case.seed,
        max_grad_norm=1.0,
        **ON_CPU,
    )


class Watch(TrainerCallback):
    """Times the parts of GKDTrainer's step from outside, and notes what it worked on."""

    def __init__(self, trainer: Any, clock: StepClock) -> None:
        self.clock = clock
        self.prompts: list[list[int]] = []
        self.same_batch: tuple[float, float] | None = None
        """TRL's and opd's reverse KL (nats per token) of the first step, from the same logits."""
        self._generate = trainer.generate_on_policy_outputs
        self._divergence = trainer.generalized_jsd_loss
        self._tokens = self._rollouts = 0
        self._loss = self._divisor = 0.0
        trainer.generate_on_policy_outputs = self.generate
        trainer.generalized_jsd_loss = self.divergence
        trainer.teacher_model.forward = clock.wrap(trainer.teacher_model.forward, "teacher")

    def generate(self, model: Any, inputs: dict[str, torch.Tensor], config: Any) -> Any:
        with self.clock.phase("rollout"):
            out = self._generate(model, inputs, config)
        for ids, mask in zip(inputs["prompts"], inputs["prompt_attention_mask"], strict=True):
            self.prompts.append(ids[mask.bool()].tolist())
        self._tokens, self._rollouts = int((out[2] != -100).sum()), out[2].shape[0]
        return out

    def divergence(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, **options: Any) -> torch.Tensor:
        loss = self._divergence(student_logits=student_logits, teacher_logits=teacher_logits, **options)
        counted = options.get("num_items_in_batch")
        self._divisor = float(self._tokens if counted is None else counted)
        self._loss = loss.item() * self._divisor / self._tokens
        if self.same_batch is None:
            mask = options["labels"] != -100
            own = reverse_kl(to_logp(student_logits.detach()[mask]), to_logp(teacher_logits[mask]))
            self.same_batch = (self._loss, own.mean().item())
        return loss

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.clock.steps:
            self.clock.restart()  # loading and set-up are not part of the first step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step(rollouts=self._rollouts, tokens=self._tokens, loss=self._loss, loss_divisor=self._divisor)


def check(result_path: str) -> None:
    """TRL's generalised JSD and opd's published form, on the same random logits: largest differences, per token and of the loss
    and its gradient with masking and a global count, in float64."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    warnings.simplefilter("ignore")  # opd warns of what the published form does near 0 and 1; here it is wanted
    generator = torch.Generator().manual_seed(0)
    shape = (4, 12, 101)
    student = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(shape[:2], generator=generator) < 0.3, -100, 1)
    mask, differences = labels != -100, {}
    for beta in BETAS:
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)
        ours = generalized_jsd(to_logp(student), to_logp(teacher), beta, normalize=False)
        per_token = (theirs - ours).abs().max().item()
        x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
        count = int(mask.sum()) + 5  # as if other pieces of the batch held five more tokens
        GKDTrainer.generalized_jsd_loss(x, teacher, labels=labels, beta=beta, num_items_in_batch=count).backward()
        weights = token_weights(mask.nonzero()[:, 0], mask.sum(1), global_count=count, dtype=torch.float64)
        weighted_sum(
            generalized_jsd(to_logp(y[mask]), to_logp(teacher[mask]), beta, normalize=False), weights
        ).backward()
        assert x.grad is not None and y.grad is not None
        differences[str(beta)] = {"per_token": per_token, "gradient": (x.grad - y.grad).abs().max().item()}
    Path(result_path).write_text(json.dumps(differences))


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "--check" else main(*sys.argv[1:])
