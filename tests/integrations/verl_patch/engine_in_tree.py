"""One training step of a patched tree's own FSDP engine in this very process: loss and every gradient against plain transformers.

`python engine_in_tree.py MODELS`, with the tree first on PYTHONPATH; test_patched_tree.py starts it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from verl.trainer.ppo.opd_core.step import OnPolicyDistillation
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, PolicyLossConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl_engines import PROMPT_LENGTHS, RESPONSE_LENGTHS, batch, join, step

import opd.integrations.verl.dry_run.register
from mixing_models import tiny
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model

TOKENS = 258  # of the byte tokenizer
ROUNDING = 1e-5  # of the largest entry: float32 sums in another order
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
HIDDEN = ((0, 2), (2, 0), (3, 3))
CASES: dict[str, dict[str, Any]] = {
    "reverse KL, packed, at a rollout temperature": {"rollout": 0.7},
    "gkd, padded, two micro-batches": {
        "packed": False,
        "micro": 2,
        "distillation_type": "gkd",
        "distillation_beta": 0.3,
    },
    "forward KL at temperature 2 beside PPO, rollouts at 0.5": {
        "rollout": 0.5,
        "micro": 2,
        "distillation_type": "forward_kl",
        "distillation_temperature": 2.0,
        "hybrid_lambda_rl": 0.5,
        "hybrid_lambda_distill": 3.0,
    },
    "JSD to a mixture of two teachers, one with rows to spare": {
        "distillation_type": "generalized_jsd",
        "distillation_beta": 0.25,
        "teachers": ("teacher", "wide"),
        "weights": [0.3, 0.7],
        "micro": 1,
    },
    "a teacher with convolutions, which would mix packed sequences": {"teachers": ("lfm2",), "micro": 2},
    "a padding row that was sampled, which a teacher has no row for": {"student": "padded", "token": 280, "last": True},
    "a padding row that was sampled, and that both models read on after": {
        "student": "padded",
        "token": 280,
        "teachers": ("wide",),
    },
    "a teacher with linear attention, and one without, which stays packed": {"teachers": ("qwen3_5_text", "teacher")},
}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def divergence(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The definition."""
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    if name == "generalized_jsd":
        return kl(q, m) / (1 - beta) + kl(p, m) / beta
    return {"reverse_kl": lambda: kl(p, q), "forward_kl": lambda: kl(q, p), "gkd": lambda: kl(p, m)}[name]()


def ppo(logp: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Clipped at 0.2, and at 3 where the advantage is negative: verl's defaults."""
    ratio = (logp - old).exp()
    clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    return torch.where(advantage < 0, torch.minimum(clipped, -3.0 * advantage), clipped)


def plainly(models: Path, data: Any, names: tuple[str, ...], policy: dict[str, Any], rollout: float):
    """Sequence by sequence, from whole logits, by autograd."""
    learner, *experts = (
        AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager", dtype=torch.float32)
        for name in names
    )
    temperature, beta = policy.get("distillation_temperature", 1.0), policy.get("distillation_beta", 0.5)
    terms = []
    columns = (data[name].unbind() for name in ("prompts", "responses", "old_log_probs", "advantages", "response_mask"))
    for prompt, response, old, advantage, mask in zip(*columns, strict=True):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        whole = learner(input_ids=ids).logits[0, at]
        ids = ids[:, :-1]  # the last token is read by nobody
        p = (whole[:, :TOKENS] / temperature).log_softmax(-1)
        with torch.no_grad():
            said = [
                (e(input_ids=ids).logits[0, at, :TOKENS] / temperature).log_softmax(-1).double().exp() for e in experts
            ]
        weights = policy.get("weights", [1.0 / len(experts)] * len(experts))
        q = sum(w * x for w, x in zip(weights, said, strict=True)).log().float()  # pyright: ignore[reportAttributeAccessIssue]
        loss = policy.get("hybrid_lambda_distill", 1.0) * divergence(
            policy.get("distillation_type", "reverse_kl"), p, q, beta
        )
        if policy.get("hybrid_lambda_rl"):
            logp = (whole / rollout).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
            loss = loss + policy["hybrid_lambda_rl"] * ppo(logp, old, advantage)
        terms.append(loss[mask.bool()])
    total = torch.cat(terms).mean()
    total.backward()
    return total.item(), {name: p.grad for name, p in learner.named_parameters()}


def gathered(module: Any) -> list[str]:
    """The layers that FSDP2 has not sharded again."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, FSDPModule))
    return [name for name, layer in layers if not layer._get_fsdp_state()._fsdp_param_group.is_sharded]


def put(data: Any, token: int, position: int) -> None:
    """In place of a response token of the third sequence, of eight."""
    data["input_ids"].values()[int(data["input_ids"].offsets()[2]) + PROMPT_LENGTHS[2] + position] = token
    data["responses"].values()[int(data["responses"].offsets()[2]) + position] = token


def student_engine(models: Path, name: str, packed: bool, reshard: bool = True) -> Any:
    built = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(models / name), override_config={"attn_implementation": "sdpa"}, use_remove_padding=packed
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", mixed_precision=FP32, use_torch_compile=False, reshard_after_forward=reshard
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=None,
    )
    # The class for a CPU is ours, and its steps are those of the tree.
    assert type(built).forward_step.__module__ == "verl.workers.engine.fsdp.transformer_impl", type(built)
    assert isinstance(built, FSDPEngineWithLMHead)
    built.initialize()
    return built


def loss_function(models: Path, built: Any, teachers: tuple[str, ...], micro: int, **policy: Any) -> Any:
    opd: dict[str, Any] = {"teachers": {name: {"model": str(models / name)} for name in teachers}}
    if "weights" in policy:
        opd["mixture"] = {"weights": dict(zip(teachers, policy.pop("weights"), strict=True))}
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=micro,
        policy_loss=PolicyLossConfig(loss_mode="on_policy_distillation", opd=opd, **policy),
    )
    return OnPolicyDistillation(config=config, engine=built)


def refuses_a_student_that_mixes(models: Path) -> None:
    """verl prepares its inputs before the loss sees them."""
    built = student_engine(models, "qwen3_next", packed=True)
    with pytest.raises(ValueError, match="use_remove_padding=False"):
        loss_function(models, built, ("teacher",), 4)
    loss_function(models, student_engine(models, "qwen3_next", packed=False), ("teacher",), 4)  # as advised


def main(models: Path) -> None:
    assert opd.integrations.verl.dry_run.register
    join()
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for seed, kind in enumerate(("lfm2", "qwen3_next", "qwen3_5_text")):
        save_model(tiny(kind, len(tokenizer), seed=seed, initializer_range=0.2), tokenizer, models / kind)
    for told, case in CASES.items():
        case = dict(case)
        rollout, packed, micro = case.pop("rollout", 1.0), case.pop("packed", True), case.pop("micro", 4)
        student, teachers = case.pop("student", "student"), case.pop("teachers", ("teacher",))
        token, last = case.pop("token", None), case.pop("last", False)
        built = student_engine(models, student, packed, reshard=micro > 2)
        data = batch(micro_batch_size=micro, remove_padding=packed, temperature=rollout, hide=HIDDEN)
        if token is not None:
            put(data, token, 7 if last else 2)
        loss = loss_function(models, built, teachers, micro, **case)
        value, gradients, metrics = step(built, data, loss)
        assert not any(gathered(teacher.module) for teacher in loss.teachers), f"{told}: a teacher holds whole layers"
        expected, wanted = plainly(models, data, (student, *teachers), case, rollout)
        assert abs(value - expected) < 1e-5 * max(1.0, abs(expected)), f"{told}: {value}, not {expected}"
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            bound = ROUNDING * float(gradient.abs().max())
            torch.testing.assert_close(
                gradients[name], gradient, atol=bound, rtol=1e-4, msg=lambda m, n=name, t=told: f"{t}: {n}: {m}"
            )
        tokens = sum(RESPONSE_LENGTHS) - len(HIDDEN)
        print(f"ok {told}: {value:.6f} over {tokens} tokens, {sorted(metrics)[:3]}", flush=True)
    refuses_a_student_that_mixes(models)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
