"""One GRPO run of TRL's GRPOTrainer on the convergence benchmark's task. Runs in the environment that benchmarks/loop.py makes for
TRL. `python -m benchmarks._convergence_trl CASE RESULT`, or `… --check RESULT` to compare the two losses on one batch."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from benchmarks._convergence_methods import METHODS
from benchmarks._convergence_model import Shape, TinyDecoder
from benchmarks._convergence_store import Setting, one_thread
from benchmarks._convergence_task import VOCAB, Prompts, accuracy, draw_prompts, fitted, generator
from benchmarks._convergence_train import EVALUATE_EVERY, MAX_NORM, Curve, Job, collect, loss_of, total_loss
from benchmarks._convergence_world import Cell, world
from benchmarks._trl import ON_CPU, versions
from opd.config import OptimizerConfig
from opd.kernels import PolicyTerm, objective_from_logits
from opd.losses import weighted_sum
from opd.optim.build import learning_rate_factor
from opd.testing import digit_tokenizer

CHARACTERS = "0123456789><"
"""Of token ids 0 to 11. <pad> and <eos> have ids that the model has no rows for, so a response is never shorter."""


def main(case_path: str, result_path: str) -> None:
    one_thread()
    case = json.loads(Path(case_path).read_text())
    cell = Cell(**case["setting"].pop("cell") | {"domains": (0,)})
    setting = Setting(cell=cell, **case["setting"])
    there = world(cell, setting.seed)
    watch = Watch(there.base.shape, there.held, there.level(setting.stop_level / 100))
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(there.base, setting.job(), folder, own_draws=case["own_draws"])
        trainer.add_callback(watch)
        watch.start(there.base)
        trainer.train()
    result = {"steps": watch.curve.steps, "values": watch.curve.values, "seconds": watch.spent / watch.curve.steps[-1]}
    Path(result_path).write_text(json.dumps(result | {"versions": versions()}))


# --- the same weights in transformers ---


def gpt2(decoder: TinyDecoder) -> GPT2LMHeadModel:
    """The decoder's weights in GPT-2, whose attention biases, which the decoder does not have, are zero and stay so."""
    shape = decoder.shape
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=2 * shape.hidden,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.load_state_dict(as_gpt2(decoder.state_dict(), shape.layers), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_attn.bias", "attn.c_proj.bias")):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


def _pairs(layers: int) -> Iterator[tuple[str, str, bool]]:
    """The decoder's name, GPT-2's, and whether GPT-2 keeps the transpose; all but query, key and value."""
    yield "tokens.weight", "transformer.wte.weight", False
    yield "places.weight", "transformer.wpe.weight", False
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        yield f"{ours}.out.weight", f"{theirs}.attn.c_proj.weight", True
        for name, other, turned in (
            ("norm1", "ln_1", False),
            ("norm2", "ln_2", False),
            ("up", "mlp.c_fc", True),
            ("down", "mlp.c_proj", True),
        ):
            yield f"{ours}.{name}.weight", f"{theirs}.{other}.weight", turned
            yield f"{ours}.{name}.bias", f"{theirs}.{other}.bias", False
    yield "norm.weight", "transformer.ln_f.weight", False
    yield "norm.bias", "transformer.ln_f.bias", False


_ATTENTION = ("query", "key", "value")


def as_gpt2(named: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A tensor per weight of the decoder, as GPT-2 has them."""
    found = {theirs: named[ours].T if turned else named[ours] for ours, theirs, turned in _pairs(layers)}
    for i in range(layers):
        parts = [named[f"layers.{i}.{part}.weight"].T for part in _ATTENTION]
        found[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat(parts, dim=1)
    return found | {"lm_head.weight": named["tokens.weight"]}


def as_decoder(named: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of `as_gpt2`."""
    found = {ours: named[theirs].T if turned else named[theirs] for ours, theirs, turned in _pairs(layers)}
    for i in range(layers):
        parts = named[f"transformer.h.{i}.attn.c_attn.weight"].chunk(3, dim=1)
        found |= {f"layers.{i}.{name}.weight": part.T for name, part in zip(_ATTENTION, parts, strict=True)}
    return found


def decoder_of(model: Any, shape: Shape) -> TinyDecoder:
    decoder = TinyDecoder(shape, 0)
    decoder.load_state_dict(as_decoder(model.state_dict(), shape.layers))
    return decoder


# --- the same training in TRL ---


def grpo_trainer(base: TinyDecoder, job: Job, folder: str, *, own_draws: bool) -> Any:
    """GRPOTrainer on the job's prompts in the job's order. With `own_draws` its own `generate` samples; without, opd's sampler does,
    with opd's random numbers, from the weights that TRL has at that update."""
    import datasets
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

    rows = [row for step in range(1, job.max_steps + 1) for row in dataset_rows(prompts_of(job, step))]

    def replay(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        source = generator(job.seed, trainer.state.global_step + 1, "rollouts")
        drawn = draw_prompts(job.rollouts // job.method.samples, job.digits, job.domains, source)
        decoder = decoder_of(trainer.model, base.shape)
        responses = decoder.sample(drawn.ids, job.method.samples, job.digits, source)
        repeated = drawn.ids.repeat_interleave(job.method.samples, 0)
        if list(prompts) != texts(repeated):
            raise SystemExit("TRL's prompts of this update are not opd's.")
        return {"prompt_ids": repeated.tolist(), "completion_ids": responses.tolist(), "logprobs": None}

    trainer = GRPOTrainer(
        model=gpt2(base),
        reward_funcs=sorted_in_full,
        args=arguments(job, folder),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=digit_tokenizer(extra=CHARACTERS[-1]),
        rollout_func=None if own_draws else replay,
    )
    trainer.create_optimizer()  # TRL's choice from its arguments; its schedule with warm-up would start at a rate of 0
    warmup = OptimizerConfig(warmup_steps=job.method.warmup)
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: learning_rate_factor(step, job.max_steps, warmup))
    return trainer


def prompts_of(job: Job, step: int) -> Prompts:
    """As `collect` draws them."""
    source = generator(job.seed, step, "rollouts")
    return draw_prompts(job.rollouts // job.method.samples, job.digits, job.domains, source)


def texts(ids: Tensor) -> list[str]:
    return ["".join(CHARACTERS[i] for i in row) for row in ids.tolist()]


def dataset_rows(prompts: Prompts) -> list[dict[str, Any]]:
    answers = prompts.answers.tolist()
    return [{"prompt": p, "answer": a} for p, a in zip(texts(prompts.ids), answers, strict=True)]


def sorted_in_full(completion_ids: Sequence[list[int]], answer: Sequence[list[int]], **_: Any) -> list[float]:
    """The benchmark's reward: 1 for a response that is the sorted prompt in full, else 0."""
    return [float(list(c) == list(a)) for c, a in zip(completion_ids, answer, strict=True)]


def arguments(job: Job, folder: str) -> Any:
    """The job in TRL's words. Those that differ from TRL's defaults, and those that matter here and do not: benchmarks/README.md."""
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports]

    betas = OptimizerConfig().betas
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job.rollouts,
        gradient_accumulation_steps=1,
        num_generations=job.method.samples,
        num_iterations=1,
        max_steps=job.max_steps,
        shuffle_dataset=False,
        max_completion_length=job.digits,
        mask_truncated_completions=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        importance_sampling_level="token",
        learning_rate=job.lr,
        optim="adamw_torch_fused",
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=1e-8,
        seed=job.seed,
        max_grad_norm=MAX_NORM,
        **ON_CPU,
    )


class Watch(TrainerCallback):
    """The benchmark's exact accuracy after the same updates as in `train`, and the end at the same level."""

    def __init__(self, shape: Shape, held: Prompts, stop_at: float) -> None:
        self.shape, self.held, self.stop_at = shape, held, stop_at
        self.curve = Curve()
        self.spent = self.started = 0.0
        """CPU seconds of updates, without evaluation."""

    def start(self, base: TinyDecoder) -> None:
        self.curve.add(0, accuracy(base, self.held)[0])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.started or time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        now = time.process_time()
        self.spent += now - self.started
        step = state.global_step
        if step % max(1, step // EVALUATE_EVERY) == 0 or step == args.max_steps:
            self.curve.add(step, accuracy(decoder_of(model, self.shape), self.held)[0])
            control.should_training_stop = self.curve.values[-1] >= self.stop_at
        self.started = time.process_time()


# --- the same loss ---

CHECK_DIGITS, CHECK_SEED = 3, 7


def check(result_path: str) -> None:
    """One update of both on the same samples: largest differences of log-probs, advantages, loss and gradient, beside the size
    of what is compared."""
    one_thread()
    shape = Shape(VOCAB, 2 * CHECK_DIGITS + 1)
    base = fitted(shape, CHECK_DIGITS, 1.0, (0,), CHECK_SEED)
    job = Job(
        method=METHODS["grpo4"],
        optimizer="adamw",
        lr=1e-3,
        rollouts=64,
        digits=CHECK_DIGITS,
        domains=(0,),
        seed=CHECK_SEED,
        max_steps=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(base, job, folder, own_draws=False)
        seen = Seen(trainer)
        trainer.add_callback(seen)
        trainer.train()
    Path(result_path).write_text(json.dumps(compare(base, job, seen) | {"versions": versions()}))


class Seen(TrainerCallback):
    """What TRL's update worked with: the batch, the loss, the gradient after clipping."""

    def __init__(self, trainer: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.loss = 0.0
        self.gradient: dict[str, Tensor] = {}
        self.ratio_loss = 0.0
        """Of the same batch, had it been sampled by a model that gave every response token `OLD` nats more or less."""
        self._compute_loss = trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        loss = self._compute_loss(model, inputs, **options)
        self.inputs, self.loss = inputs, loss.item()
        with torch.no_grad():
            old = inputs["completion_ids"]
            self.ratio_loss = self._compute_loss(
                model, inputs | {"old_per_token_logps": self.logp(model) + shift(old)}
            ).item()
        return loss

    @torch.no_grad()
    def logp(self, model: Any) -> Tensor:
        """By transformers' own forward pass, [rows, response]."""
        prompts, responses = self.inputs["prompt_ids"], self.inputs["completion_ids"]
        logits = model(input_ids=torch.cat([prompts, responses], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shift(responses: Tensor) -> Tensor:
    """Between −0.5 and 0.5 nats, so that ratios leave the clipping range on both sides."""
    return ((responses * 7 + torch.arange(responses.shape[1])) % 11).float() / 10 - 0.5


def compare(base: TinyDecoder, job: Job, seen: Seen) -> dict[str, float]:
    batch, logits = collect(job, base, (), 1)
    hybrid = job.method.hybrid
    order = _order(batch.response_ids.view(-1, job.digits), batch.sequences.input_ids, seen.inputs)
    y_logp = logits().detach().log_softmax(-1).gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    ours = y_logp.view(-1, job.digits)[order]
    theirs = seen.logp(gpt2(base))
    assert batch.advantages is not None
    advantages = batch.advantages.view(-1, job.digits)[order, 0]
    by_row = torch.empty_like(advantages)
    by_row[order] = seen.inputs["advantages"]
    same = replace(batch, advantages=by_row.repeat_interleave(job.digits))
    assert same.advantages is not None
    old = y_logp + shift(batch.response_ids.view(-1, job.digits)).flatten()
    term = PolicyTerm(advantages=same.advantages, old_log_prob=old, clip_range=hybrid.clip_range)
    per_token, _ = objective_from_logits(logits(), None, same.response_ids, hybrid.distill, policy=term)
    ratio_loss = weighted_sum(per_token, batch.token_weights).item()
    gradient = as_decoder(seen.gradient, base.shape.layers)
    own = _clipped(base, total_loss(batch, logits(), hybrid))
    own_same = _clipped(base, total_loss(same, logits(), hybrid))
    return {
        "rewarded": float((seen.inputs["advantages"] > 0).sum()),
        "log_prob": _difference(ours, theirs),
        "advantage": _difference(advantages, seen.inputs["advantages"]),
        "largest_advantage": float(advantages.abs().max()),
        "loss": abs(loss_of(batch, logits(), hybrid)[0].item() - seen.loss),
        "ratio_loss": abs(ratio_loss - seen.ratio_loss),
        "ratio_loss_value": ratio_loss,
        "gradient_norm": float(torch.stack([g.norm() for g in own.values()]).norm()),
        "gradient": max(_difference(own[n], gradient[n]) for n in own),
        "gradient_same_advantages": max(_difference(own_same[n], gradient[n]) for n in own),
        "largest_gradient": max(float(g.abs().max()) for g in own.values()),
    }


def _order(responses: Tensor, ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which of our rows each of TRL's rows is: it shuffles them before the update."""
    ours = [tuple(row) for row in ids.tolist()]
    left: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(ours):
        left.setdefault(row, []).append(number)
    theirs = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1).tolist()
    assert len(theirs) == len(responses)
    return torch.tensor([left[tuple(row)].pop() for row in theirs])


def _clipped(model: TinyDecoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1] == "--check" else main(*sys.argv[1:])
