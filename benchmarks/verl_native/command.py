"""verl's own top-k distillation beside the same data with a bucket for the tail.

`python -m benchmarks verl_native`, in an environment with verl, lets a teacher score sequences that a student sampled, gives its top k
to verl's own loss (`forward_kl_topk`, as verl's workers call it) and to ours with tail=bucket, and compares values and gradients with the
forward KL over the whole vocabulary, and then minimises each. It writes benchmarks/results/verl_native.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import RESULTS, markdown
from opd.losses import entry_terms, forward_kl, gather_logp, partial_divergence, to_logp
from opd.testing import tiny_causal_lm

VOCAB, SEQUENCES, PROMPT, RESPONSE = 2048, 8, 4, 24
SHARPNESS = 0.4
"""Initial range of the weights; next-token distributions of a trained model have an entropy of a few nats, as these do."""
TOP_K = (1, 4, 16, 64)
NOISE = {"far": 0.2, "near": 0.05, "close": 0.02, "all but there": 0.005}
"""The student is the teacher with Gaussian noise on its weights, of this share of their size."""
START, LEARNING_RATE, STEPS, LOOKS = "close", 1e-4, 60, 3

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Sequences of one length, and what the teacher says about every token of them."""

    ids: Tensor
    """[sequences, tokens]"""
    teacher_logp: Tensor
    """[sequences · tokens, vocab]; row t is about token t+1."""

    @property
    def responses(self) -> Tensor:
        """The rows that predict response tokens, in the order of the sequences."""
        rows = torch.arange(self.ids.numel()).view(self.ids.shape)
        return rows[:, PROMPT - 1 : -1].flatten()

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's k likeliest tokens at every row and their log-probs, as a server answers."""
        best = self.teacher_logp.topk(k, dim=-1)
        return best.indices, best.values


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[sequences · tokens, vocab]"""
    return model(input_ids=ids).logits.flatten(0, 1)


@torch.no_grad()
def sampled(student: PreTrainedModel, teacher: PreTrainedModel, seed: int) -> Data:
    """Responses of the student, and the teacher's opinion of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (SEQUENCES, PROMPT), generator=generator)
    for _ in range(RESPONSE):
        likely = student(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
    return Data(ids=ids, teacher_logp=to_logp(logits_of(teacher, ids)))


def teacher_model() -> PreTrainedModel:
    return tiny_causal_lm(VOCAB, architecture="llama", seed=1, initializer_range=SHARPNESS, tie=False)


@torch.no_grad()
def noisy(teacher: PreTrainedModel, noise: float) -> PreTrainedModel:
    """A student some way from its teacher."""
    student, generator = deepcopy(teacher), torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        if parameter.dim() == 2:
            parameter += noise * SHARPNESS * torch.randn(parameter.shape, generator=generator)
    return student


def exact(logits: Tensor, data: Data) -> Tensor:
    """Forward KL over the whole vocabulary, one number per response token."""
    return forward_kl(to_logp(logits[data.responses]), data.teacher_logp[data.responses])


def bucket(logits: Tensor, data: Data, k: int) -> Tensor:
    """Forward KL of the teacher's top k and a bucket for the rest."""
    ids, teacher_logp = (said[data.responses] for said in data.top(k))
    return partial_divergence("forward_kl", gather_logp(to_logp(logits[data.responses]), ids), teacher_logp)


def tail_ignored(
    logits: Tensor, data: Data, k: int, *, log_prob_min_clamp: float | None = None, loss_max_clamp: float | None = None
) -> Tensor:
    """verl's loss from our own pieces: Σ_K q (log q − log p) with the rest left out, and verl's three clamps."""
    ids, teacher_logp = (said[data.responses] for said in data.top(k))
    student_logp = gather_logp(to_logp(logits[data.responses]), ids)
    if log_prob_min_clamp is not None:
        student_logp, teacher_logp = (logp.clamp_min(log_prob_min_clamp) for logp in (student_logp, teacher_logp))
    loss = entry_terms("forward_kl", student_logp, teacher_logp).sum(-1).clamp_min(0.0)
    return loss if loss_max_clamp is None else loss.clamp_max(loss_max_clamp)


@dataclass(frozen=True, kw_only=True)
class Native:
    """Results of verl's own functions for a micro-batch."""

    per_token: Tensor
    """After the clamp at 0, before `loss_max_clamp`."""
    total: Tensor
    """The number that is differentiated: token-mean."""
    metrics: dict[str, Any]


def native(logits: Tensor, data: Data, k: int, **settings: Any) -> Native:
    """verl's forward_kl_topk as its workers run it: once as the logits processor, once as the loss.

    `settings` are fields of verl's DistillationLossConfig; by default those of its YAML files, where both other clamps are off.
    """
    from verl.trainer.distillation.losses import (  # pyright: ignore[reportMissingImports]
        compute_topk_loss,
        distillation_loss,
        get_distillation_loss_fn,
    )

    actor, distillation = _configs(k, {"loss_max_clamp": None, "log_prob_min_clamp": None, **settings})
    micro_batch = _micro_batch(data, k)
    offsets = micro_batch["input_ids"].offsets()
    made = compute_topk_loss(actor, distillation, micro_batch, logits.unsqueeze(0), "thd")
    output = {name: torch.nested.nested_tensor_from_jagged(v.squeeze(0), offsets) for name, v in made.items()}
    call = {"config": actor, "distillation_config": distillation, "model_output": output, "data": micro_batch}
    per_token, _ = get_distillation_loss_fn("forward_kl_topk")(**call)
    total, metrics = distillation_loss(actor, distillation, output, micro_batch)
    return Native(per_token=per_token.flatten(), total=total, metrics=metrics)


def _configs(k: int, settings: dict[str, Any]) -> tuple[Any, Any]:
    from verl.workers.config import (  # pyright: ignore[reportMissingImports]
        DistillationConfig,
        DistillationLossConfig,
        FSDPActorConfig,
    )

    loss = DistillationLossConfig(
        loss_mode="forward_kl_topk", topk=k, use_task_rewards=False, use_policy_gradient=False, **settings
    )
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=SEQUENCES)
    return actor, DistillationConfig(distillation_loss=loss)


def _micro_batch(data: Data, k: int) -> Any:
    """Under the names that verl's agent loop and engine give them."""
    from verl.utils import tensordict_utils as tu  # pyright: ignore[reportMissingImports]

    def jagged(rows: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    ids, teacher_logp = (said.unflatten(0, data.ids.shape) for said in data.top(k))
    responses = data.ids[:, PROMPT:]
    return tu.get_tensordict(
        {
            "input_ids": jagged(data.ids),
            "prompts": jagged(data.ids[:, :PROMPT]),
            "responses": jagged(responses),
            "response_mask": jagged(torch.ones_like(responses)),
            "teacher_ids": jagged(ids),
            "teacher_logprobs": jagged(teacher_logp),
        },
        {"dp_size": 1, "batch_num_tokens": responses.numel(), "global_batch_size": SEQUENCES},
    )


def gradient(logits: Tensor, loss_of: Loss) -> Tensor:
    """d loss / d logits, flat."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0].flatten()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def compared(student: PreTrainedModel, data: Data, k: int) -> list[str]:
    """One table row."""
    with torch.no_grad():
        logits = logits_of(student, data.ids)
        value, whole = native(logits, data, k), exact(logits, data).mean().item()
        bucketed = bucket(logits, data, k).mean().item()
    true = gradient(logits, lambda x: exact(x, data).mean())
    of_native = gradient(logits, lambda x: native(x, data, k).total)
    of_bucket = gradient(logits, lambda x: bucket(x, data, k).mean())
    return [
        str(k),
        f"{data.top(k)[1][data.responses].exp().sum(-1).mean():.2f}",
        f"{(value.per_token == 0).double().mean():.0%}",
        f"{whole:.3f}",
        f"{value.total.item():.3f}",
        f"{bucketed:.3f}",
        f"{cosine(of_native, true):.3f}",
        f"{cosine(of_bucket, true):.3f}",
    ]


def trained(student: PreTrainedModel, data: Data, loss_of: Loss) -> list[str]:
    """The exact forward KL while `loss_of` the logits is minimised, on the very data that it is minimised on."""
    learner = deepcopy(student)
    adam = torch.optim.Adam(learner.parameters(), lr=LEARNING_RATE)
    seen = []
    for step in range(1, STEPS + 1):
        adam.zero_grad()
        loss_of(logits_of(learner, data.ids)).backward()
        adam.step()
        if step % (STEPS // LOOKS) == 0:
            with torch.no_grad():
                seen.append(f"{exact(logits_of(learner, data.ids), data).mean():.4f}")
    return seen


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks verl_native", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("verl") is None:
        print(
            "verl is not installed in this environment; pip install -c constraints-verl.txt -e '.[verl]'.",
            file=sys.stderr,
        )
        return 2
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    torch.set_num_threads(1)
    import verl  # pyright: ignore[reportMissingImports]

    teacher = teacher_model()
    beside = []
    for name, noise in NOISE.items():
        student = noisy(teacher, noise)
        data = sampled(student, teacher, seed=0)
        beside += [[name, *compared(student, data, k)] for k in TOP_K]
    start = noisy(teacher, NOISE[START])
    data = sampled(start, teacher, seed=0)
    ends = [["whole vocabulary", "", *trained(start, data, lambda x: exact(x, data).mean())]]
    for k in TOP_K:
        ends += [["verl's own", str(k), *trained(start, data, lambda x, k=k: native(x, data, k).total)]]
        ends += [["bucket", str(k), *trained(start, data, lambda x, k=k: bucket(x, data, k).mean())]]
    text = report(verl.__version__, beside, ends)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "verl_native.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def report(verl_version: str, beside: list[list[str]], ends: list[list[str]]) -> str:
    head = ("student", "k", "teacher's mass", "no gradient", "exact", "verl's own", "bucket")
    head += ("cos verl's own", "cos bucket")
    return f"""# verl's own top-k forward KL, and the same data with a bucket

`python -m benchmarks verl_native`: verl {verl_version}, torch {torch.__version__}, float32, 1 thread. The teacher is a random Llama of
{VOCAB} tokens; the student is the teacher with noise on its weights ({", ".join(f"{name}: {noise:g}" for name, noise in NOISE.items())} of their size). {SEQUENCES} prompts,
{RESPONSE} tokens sampled from the student for each. "verl's own" is `forward_kl_topk` with the clamps of its YAML files: the one at 0, no other.
Values are means over tokens, in nats; exact is the forward KL over the whole vocabulary. Cosines are of the gradients in the logits with
that of exact. A token has no gradient where verl's sum over the teacher's top k is negative and clamped to 0.

{markdown.table(head, beside)}

The exact forward KL of the "{START}" student while each loss is minimised (Adam, {LEARNING_RATE:g}) and seen on the same sequences:

{markdown.table(("loss", "k", *(f"{step} steps" for step in range(STEPS // LOOKS, STEPS + 1, STEPS // LOOKS))), ends)}
"""
