"""The engine against plain transformers and plain losses, in one process: loss and gradients, however the batch is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from verl.trainer.ppo.core_algos import agg_loss
from verl_engines import FP32, RESPONSE_LENGTHS, TERM, batch, engine, policy_loss, same, step

from opd.errors import ModelError, NonFiniteError
from opd.integrations.verl.plugin.head import run_to_head
from opd.losses import Objective
from opd.types import DenseTarget

TOKENS = 258  # of the byte tokenizer


def plainly(
    models: Path,
    data,
    objective: Objective,
    *,
    student: str = "student",
    teacher: str = "teacher",
    reduction: str = "token-mean",
):
    """The same loss sequence by sequence: whole logits, no packing, no FSDP, no kernels. verl's function averages."""
    learner = AutoModelForCausalLM.from_pretrained(models / student, attn_implementation="eager", dtype=torch.float32)
    expert = AutoModelForCausalLM.from_pretrained(models / teacher, attn_implementation="eager", dtype=torch.float32)
    rows = []
    columns = (data[name].unbind() for name in ("prompts", "responses", "old_log_probs"))
    for prompt, response, sampler_logp in zip(*columns, strict=True):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        with torch.no_grad():
            target = DenseTarget(logits=expert(input_ids=ids).logits[0, at, :TOKENS])
        sampler = {"sampler_logp": sampler_logp} if objective.support == "sampled" else {}
        loss, _ = objective.per_token_loss(
            learner(input_ids=ids).logits[0, at, :TOKENS],
            target,
            response,
            sequence_index=torch.zeros_like(response),
            **sampler,
        )
        rows.append(torch.nn.functional.pad(loss, (0, max(RESPONSE_LENGTHS) - len(loss))))
    mask = data["response_mask"].to_padded_tensor(0)
    total = agg_loss(
        torch.stack(rows), mask, reduction, batch_num_tokens=int(mask.sum()), global_batch_size=len(rows), dp_size=1
    )
    total.backward()
    return total.item(), {name: p.grad for name, p in learner.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "forward_kl"},
        {"divergence": "generalized_jsd", "beta": 0.3},
        {"divergence": "reverse_kl", "support": "teacher_top_k", "top_k": 16},
        {"divergence": "reverse_kl", "student_temperature": 2.0, "teacher_temperature": 2.0, "scale_by_t2": True},
        {"support": "sampled", "estimator": "k1", "delivery": "advantage"},
        {"support": "sampled", "estimator": "k1", "delivery": "advantage", "discount": 0.5, "clip_range": 0.2},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_loss_and_every_gradient_are_those_of_plain_transformers(models: Path, settings: dict):
    loss, gradients, _ = step(engine(models, **settings), batch())
    expected, plain_gradients = plainly(models, batch(), Objective(**settings))
    assert loss == pytest.approx(expected, rel=1e-6, abs=TERM)
    same(gradients, plain_gradients)


@pytest.mark.parametrize("settings", [{}, {"rl_weight": 0.5}], ids=["distillation", "beside a reward"])
def test_float16_under_verls_loss_scaler_keeps_the_gradient_of_a_large_mini_batch(models: Path, settings: dict):
    """1 / 1.8 million tokens would vanish in float16, were it multiplied in before verl's scale of 65536."""
    mode = "seq-mean-token-sum-norm"
    slopes = []
    for precision in (FP32, {**FP32, "param_dtype": "fp16"}):
        built = engine(models, reduction=mode, mixed_precision=precision, **settings)
        built.reduction["loss_scale_factor"] = 450_000
        if built.scaler is not None:
            built.scaler = ShardedGradScaler(device="cpu")  # verl's is for CUDA, and without one it scales nothing
        _, gradients, _ = step(built, batch(), policy_loss(mode, scale_factor=450_000))
        scale = 1.0 if built.scaler is None else built.scaler.get_scale()
        slopes.append({name: gradient.float() / scale for name, gradient in gradients.items()})
    exact, found = slopes
    assert exact.keys() == found.keys()
    apart = sum(float((found[n] - exact[n]).square().sum()) for n in exact) ** 0.5
    assert apart < 0.01 * sum(float(g.square().sum()) for g in exact.values()) ** 0.5


def test_gkd_is_the_skewed_reverse_kl(models: Path):
    loss, gradients, _ = step(engine(models, distillation_type="gkd", distillation_beta=0.4), batch())
    expected, plain_gradients = plainly(models, batch(), Objective(divergence="skew_reverse_kl", beta=0.4))
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


def test_tied_embeddings_get_both_ends_gradients(models: Path):
    loss, gradients, _ = step(engine(models, student="tied"), batch())
    expected, plain_gradients = plainly(models, batch(), Objective(), student="tied")
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_make_no_difference(models: Path, size: int):
    built = engine(models)
    whole, gradients, metrics = step(built, batch())
    parts, part_gradients, part_metrics = step(built, batch(micro_batch_size=size))
    assert parts == pytest.approx(whole, rel=1e-6)
    same(part_gradients, gradients)
    assert part_metrics == pytest.approx(metrics, rel=1e-5)


def test_padded_rows_are_packed_ones(models: Path):
    packed, gradients, _ = step(engine(models), batch())
    padded, padded_gradients, _ = step(engine(models, remove_padding=False), batch(remove_padding=False))
    assert padded == pytest.approx(packed, rel=1e-6)
    same(padded_gradients, gradients)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_tokens_are_averaged_as_verl_averages_them(models: Path, reduction: str):
    data = batch(hide=((2, 3),))
    loss, gradients, _ = step(engine(models, reduction=reduction), data)
    expected, plain_gradients = plainly(models, data, Objective(), reduction=reduction)
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


def test_a_masked_token_has_no_say(models: Path):
    data = batch(hide=((2, 3),))
    loss, gradients, _ = step(engine(models), data)
    expected, plain_gradients = plainly(models, data, Objective())
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
def test_hybrid_is_the_weighted_sum_of_both_losses_and_gradients(models: Path, remove_padding: bool):
    """verl's loss with its entropy bonus, at a rollout temperature of its own, from log-probs that need no logits."""

    def run(**opd: float):
        data = batch(temperature=1.3, entropy=True, remove_padding=remove_padding, hide=((2, 3),))
        return step(engine(models, remove_padding=remove_padding, **opd), data, policy_loss(entropy_coeff=0.1))

    distilled, gradients, _ = run()
    stock, stock_gradients, stock_metrics = run(rl_weight=1.0, rl_distill_weight=0.0)
    both, both_gradients, metrics = run(rl_weight=0.7, rl_distill_weight=0.2)
    assert both == pytest.approx(0.7 * stock + 0.2 * distilled, rel=1e-5)
    same(both_gradients, {name: 0.7 * stock_gradients[name] + 0.2 * g for name, g in gradients.items()})
    assert stock_metrics.keys() <= metrics.keys()
    for name, value in stock_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_hybrid_advantages_are_added_before_verls_policy_loss(models: Path):
    """λ_rl A + λ_distill (log q − log p) at each counted token, and verl's clipped loss of the sum."""
    hide = ((2, 3),)
    as_one = {"support": "sampled", "estimator": "k1", "delivery": "advantage", "rl_combine": "advantages"}
    both, gradients, metrics = step(engine(models, rl_weight=0.7, rl_distill_weight=0.2, **as_one), batch(hide=hide))
    data = batch(hide=hide)
    combined = []
    learner, expert = (
        AutoModelForCausalLM.from_pretrained(models / name, attn_implementation="eager", dtype=torch.float32)
        for name in ("student", "teacher")
    )
    columns = (data[name].unbind() for name in ("prompts", "responses", "advantages", "response_mask"))
    for prompt, response, advantage, mask in zip(*columns, strict=True):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        with torch.no_grad():
            logp, logq = (
                m(input_ids=ids).logits[0, at, :TOKENS].log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
                for m in (learner, expert)
            )
        combined.append(0.7 * advantage + 0.2 * (logq - logp) * mask)
    data["advantages"] = torch.nested.as_nested_tensor(combined, layout=torch.jagged)
    stock, stock_gradients, stock_metrics = step(engine(models, rl_weight=1.0, rl_distill_weight=0.0), data)
    assert both == pytest.approx(stock, rel=1e-5)
    same(gradients, stock_gradients)
    assert metrics["actor/pg_loss"] == pytest.approx(stock_metrics["actor/pg_loss"], rel=1e-5)


def test_without_distillation_the_step_is_stock_verls_to_the_bit(models: Path):
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    ours = engine(models, rl_weight=1.0, rl_distill_weight=0.0)
    assert ours.teachers is None
    loss, gradients, _ = step(ours, batch())
    data = batch()
    ours.forward_step = FSDPEngineWithLMHead.forward_step.__get__(ours)
    stock, stock_gradients, _ = step(ours, data)
    assert loss == stock
    assert all(torch.equal(gradients[name], stock_gradients[name]) for name in stock_gradients)


@pytest.mark.parametrize("student", ["student", "padded"])
def test_rows_that_are_no_token_are_left_out_on_both_sides(models: Path, student: str):
    loss, gradients, _ = step(engine(models, student=student, teacher={"model": str(models / "wide")}), batch())
    expected, plain_gradients = plainly(models, batch(), Objective(), student=student, teacher="wide")
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


def test_a_micro_batch_without_a_counted_token_adds_nothing(models: Path):
    data = batch(hide=((1, 0),), micro_batch_size=1)
    loss, gradients, _ = step(engine(models), data)
    expected, plain_gradients = plainly(models, data, Objective())
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, plain_gradients)


def test_a_hybrid_micro_batch_without_a_counted_token_adds_nothing(models: Path):
    built = engine(models, rl_weight=0.5)
    whole, gradients, _ = step(built, batch(hide=((1, 0),)))
    parts, part_gradients, _ = step(built, batch(hide=((1, 0),), micro_batch_size=1))
    assert parts == pytest.approx(whole, rel=1e-6)
    same(part_gradients, gradients)


def two_ranks(models: Path, out: Path, way: str, **settings: object) -> dict:
    """What `verl_two_ranks.py` writes down."""
    shared = {"WORLD_SIZE": "2", "DIST_INIT_METHOD": f"file://{out.parent}/store"}
    script = Path(__file__).with_name("verl_two_ranks.py")
    command = [sys.executable, script, models, out, way, json.dumps(settings)]
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(out)


ADVANTAGES = {"support": "sampled", "estimator": "k1", "delivery": "advantage", "rl_combine": "advantages"}


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("data", {"rl_weight": 0.5}),
        ("fsdp", {"rl_weight": 0.5}),
        ("sequence", {"rl_weight": 0.5, "divergence": "generalized_jsd", "beta": 0.3}),
        ("sequence", {"rl_weight": 0.5, **ADVANTAGES}),
        ("sequence", {"rl_weight": 0.0}),
        ("sequence", {"rl_weight": 0.5, "rl_scale": "match"}),
    ],
    ids=["data", "FSDP1", "sequence", "sequence, advantages", "sequence, distillation alone", "sequence, scale=match"],
)
def test_two_ranks_make_the_step_of_one(models: Path, tmp_path: Path, way: str, settings: dict[str, object]):
    """Over gloo, both models sharded, several micro-batches: half of the batch each (FSDP2, FSDP1), or half of each packed sequence."""
    out = two_ranks(models, tmp_path / "out.pt", way, **settings)
    loss, gradients, metrics = step(engine(models, **settings), batch(entropy=True), policy_loss(entropy_coeff=0.1))
    assert out["loss"] == pytest.approx(loss, rel=1e-6)
    same(out["gradients"], gradients)
    ours = {name: value for name, value in metrics.items() if name.startswith("actor/opd/")}
    assert {name: out["metrics"][name] for name in ours} == pytest.approx(ours, rel=1e-5)


@torch.no_grad()
def sampled_gap(models: Path, data) -> torch.Tensor:
    """log q − log p of every response token, by plain transformers."""
    read = {
        name: AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        for name in ("student", "teacher")
    }
    gaps = []
    for prompt, response in zip(*(data[name].unbind() for name in ("prompts", "responses")), strict=True):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        p, q = (
            read[name](input_ids=ids).logits[0, len(prompt) - 1 : -1, :TOKENS].log_softmax(-1)
            for name in ("student", "teacher")
        )
        gaps.append((q - p).gather(-1, response.unsqueeze(-1)).squeeze(-1))
    return torch.cat(gaps)


@pytest.mark.parametrize("settings", [{}, ADVANTAGES], ids=["losses", "advantages"])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_scale_match_divides_each_term_by_its_own_spread(
    models: Path, tmp_path: Path, settings: dict[str, object], micro_batch_size: int
):
    """Spreads over the counted response tokens of the whole mini-batch, taken here from the batch and from a trace."""
    data = batch(hide=((2, 3),), micro_batch_size=micro_batch_size)
    counted = data["response_mask"].values().bool()
    if settings:
        term = sampled_gap(models, data)[counted]
    else:
        step(engine(models, trace=str(tmp_path)), data)
        term = torch.cat([load_file(part)["loss"] for part in tmp_path.iterdir()])
    by_hand = {
        "advantage_std": float(data["advantages"].values()[counted].std(correction=0)),
        "distill_std": float(term.std(correction=0)),
    }
    weights = {"rl_weight": 0.5, "rl_distill_weight": 2.0}
    loss, gradients, metrics = step(engine(models, rl_scale="match", **weights, **settings), data)
    assert {name: metrics[f"actor/opd/{name}"] for name in by_hand} == pytest.approx(by_hand, rel=1e-5)
    divided = {"rl_weight": 0.5 / by_hand["advantage_std"], "rl_distill_weight": 2.0 / by_hand["distill_std"]}
    expected, by_hand_gradients, _ = step(engine(models, **divided, **settings), data)
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, by_hand_gradients)


def test_the_two_weights_move_with_verls_steps(models: Path):
    """From distillation alone, bit for bit, to the reward alone; verl's scheduler counts the steps, so a resumed run goes on."""
    moves = {
        "rl_weight": 0.0,
        "rl_weight_end": 1.0,
        "rl_distill_weight": 1.0,
        "rl_distill_weight_end": 0.0,
        "rl_schedule_steps": 3,
    }
    built = engine(models, **moves)
    for reached, weights in enumerate([(0.0, 1.0), (1 / 3, 2 / 3), (2 / 3, 1 / 3), (1.0, 0.0), (1.0, 0.0)]):
        loss, gradients, metrics = step(built, batch())
        assert (metrics["actor/opd/lambda_rl"], metrics["actor/opd/lambda_distill"]) == pytest.approx(
            weights, abs=1e-12
        )
        fixed, fixed_gradients, _ = step(engine(models, rl_weight=weights[0], rl_distill_weight=weights[1]), batch())
        assert loss == pytest.approx(fixed, rel=1e-6)
        same(gradients, fixed_gradients)
        if reached == 1:  # a second mini-batch of the same step of verl's trainer
            assert step(built, batch())[0] == loss
        if reached == 0:
            assert loss == fixed
            assert all(torch.equal(gradients[name], fixed_gradients[name]) for name in gradients)
        built.lr_scheduler_step()


def test_in_bfloat16_the_loss_is_off_by_rounding_only(models: Path):
    exact, _, _ = step(engine(models), batch())
    rounded, gradients, _ = step(engine(models, mixed_precision=None), batch())
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != exact
    assert all(g.isfinite().all() for g in gradients.values())


def test_lora_trains_the_adapters_alone_and_starts_at_the_same_loss(models: Path):
    loss, _, _ = step(engine(models), batch())
    adapted, gradients, _ = step(engine(models, lora_rank=4), batch())
    assert adapted == pytest.approx(loss, rel=1e-6)
    assert gradients and all("lora_" in name for name in gradients)
    assert any(g.abs().max() > 0 for g in gradients.values())


def test_a_teacher_that_gives_nan_stops_before_an_update(models: Path):
    for sanity_check_every, error in ((0, NonFiniteError), (1, ModelError)):
        built = engine(models, sanity_check_every=sanity_check_every)
        with torch.no_grad():
            next(built.teachers.members[0].module.parameters()).fill_(torch.nan)
        with pytest.raises(error, match=r"(?i)no update was made"):
            step(built, batch())


def test_a_model_that_caps_its_logits_is_refused():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(ModelError, match="soft-cap"):
        run_to_head(model, {"input_ids": torch.tensor([[1, 2, 3]])}, lambda *_: torch.zeros(1), "student")


def test_a_teacher_that_is_the_student_gives_exactly_nothing(models: Path):
    loss, _, metrics = step(engine(models, teacher={"model": str(models / "student")}), batch())
    assert loss == 0.0
    assert metrics["actor/opd/reverse_kl"] == 0.0


def test_metrics_are_means_over_the_response_tokens(models: Path):
    loss, _, metrics = step(engine(models), batch())
    assert metrics["actor/opd/reverse_kl"] == pytest.approx(loss, rel=1e-5)
    assert metrics["actor/opd/loss"] == pytest.approx(loss, rel=1e-6)
    assert {
        f"actor/opd/{k}"
        for k in ("forward_kl", "student_entropy", "teacher_entropy", "overlap", "eos_prob", "teacher_logp")
    } <= metrics.keys()


def test_the_teacher_does_not_learn(models: Path):
    built = engine(models)
    step(built, batch())
    assert not any(p.requires_grad or p.grad is not None for p in built.teachers.members[0].module.parameters())


def test_log_probs_outside_training_are_stock_verls(models: Path):
    built, data = engine(models), batch()
    with built.eval_mode(), torch.no_grad():
        out = built.infer_batch(data, None)
    assert set(out["model_output"]) == {"log_probs"}
