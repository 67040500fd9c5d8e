"""`train`: whatever the recipe asks for, the student moves toward the teacher and ends as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.config.recipe import build, merge
from opd.errors import ConfigError
from opd.models import response_logits
from opd.reporting.record import read_metrics
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.run import train
from opd.trainer.setup import build_parts
from worlds import settings

REQUIRED = [
    "loss",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "overlap",
    "eos_prob",
    "response_length",
    "truncated",
    "repetition",
    "grad_norm",
    "lr",
    "teacher_perplexity",
    "tokens",
    "clamped_tokens",
    "time/rollout",
    "time/teacher",
    "time/update",
    "time/step",
    "time/tokens_per_second",
]


def run(values: dict[str, object]) -> dict | None:
    return train(build(merge({}, values)))


def steps(folder: Path) -> list[dict[str, float]]:
    return [dict(r.metrics) for r in read_metrics(folder) if r.kind == "step"]


LEARNS = {
    "adamw": {},
    "muon": {"optimizer__name": "muon", "optimizer__lr": 0.02},
    "packed": {"train__layout": "packed"},
    "left padded": {"train__layout": "left_padded"},
    "bfloat16 autocast": {"train__autocast": "bfloat16"},
    "gradient checkpointing": {"student__gradient_checkpointing": True},
    "lora": {"student__lora__rank": 8, "optimizer__lr": 0.03},
    "forward KL": {"objective__divergence": "forward_kl"},
    "normalised JSD": {"objective__divergence": "generalized_jsd"},
    "teacher top-k": {"objective__support": "teacher_top_k", "objective__top_k": 4, "teacher__supply": "top_k"},
    "student top-k with sampled tail": {"objective__support": "student_top_k", "objective__top_k": 4, "objective__tail": "sampled"},
    "policy gradient": {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"},
    "k2": {"objective__support": "sampled", "objective__estimator": "k2", "teacher__supply": "sampled"},
    "off-policy teacher": {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"},
    "sequence mean, cosine": {"objective__reduction": "sequence_mean", "optimizer__schedule": "cosine"},
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNS)
def test_the_student_moves_toward_the_teacher(world, tmp_path, name):
    more = {"train__steps": 25, "train__prompts_per_step": 16, "eval__every": 25, "optimizer__lr": 0.01} | LEARNS[name]
    summary = run(settings(world, tmp_path / "run", checkpoint__every=0, **more))
    assert summary["student_after"]["reverse_kl"] < 0.75 * summary["student_before"]["reverse_kl"]
    assert summary["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-7)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    start = AutoModelForCausalLM.from_pretrained(world / "student")
    assert final.state_dict().keys() == start.state_dict().keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "student").get_vocab()["<eos>"] == 12


def test_every_metric_is_logged_every_step_and_is_finite(world, tmp_path):
    run(settings(world, tmp_path / "run"))
    rows = steps(tmp_path / "run")
    assert len(rows) == 8
    for row in rows:
        assert not set(REQUIRED) - row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] == pytest.approx(row["reverse_kl"], rel=1e-5), "token mean of reverse KL is the loss"
        assert 0 <= row["eos_prob"] <= 1 and 0 <= row["truncated"] <= 1 and 0 <= row["overlap"] <= 1
        assert row["sampler_student_gap"] < 1e-5, "the rollouts are the trained policy's own"


def test_metrics_equal_a_recomputation_from_the_two_models(world, tmp_path):
    """Step 0 from scratch: plain forward passes over the recorded tokens of the untouched models."""
    run(settings(world, tmp_path / "run", log__samples=100, train__steps=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    samples = [s for s in lines if s["phase"] == "train"]
    models = {n: AutoModelForCausalLM.from_pretrained(world / n) for n in ("student", "teacher")}
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    sums, count = {"reverse_kl": 0.0, "forward_kl": 0.0, "student_entropy": 0.0, "eos_prob": 0.0, "nll": 0.0}, 0
    for sample in samples:
        prompt = tokenizer(sample["prompt"])["input_ids"]
        response = tokenizer.convert_tokens_to_ids(sample["tokens"])
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            s, t = (
                models[n](input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for n in ("student", "teacher")
            )
        per_token = (s.exp() * (s - t)).sum(-1)
        torch.testing.assert_close(torch.tensor(sample["reverse_kl"]), per_token, atol=1e-5, rtol=1e-4)
        sums["reverse_kl"] += float(per_token.sum())
        sums["forward_kl"] += float((t.exp() * (t - s)).sum())
        sums["student_entropy"] += float(-(s.exp() * s).sum())
        sums["eos_prob"] += float(s[:, 12].exp().sum())
        sums["nll"] -= float(t.gather(-1, torch.tensor(response)[:, None]).sum())
        count += len(response)
    (row,) = steps(tmp_path / "run")
    assert len(samples) == 12 and row["tokens"] == count
    for name in ("reverse_kl", "forward_kl", "student_entropy", "eos_prob"):
        assert row[name] == pytest.approx(sums[name] / count, rel=1e-4)
    assert row["truncated"] == sum(s["tokens"][-1] != "<eos>" for s in samples) / 12
    assert 0 < row["truncated"] < 1, "the check above needs both kinds"
    assert row["teacher_perplexity"] == pytest.approx(math.exp(sums["nll"] / count), rel=1e-4)


def test_every_prompt_is_used_once_before_any_is_used_again(world, tmp_path):
    more = {"train__prompts_per_step": 8, "train__steps": 10, "train__samples_per_prompt": 1, "eval__every": 0}
    run(settings(world, tmp_path / "run", log__samples=100, log__samples_every=1, **more))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
    for epoch in (range(5), range(5, 10)):
        assert sorted(s["prompt"] for s in samples if s["step"] in epoch) == sorted(prompts)
    assert [s["prompt"] for s in samples if s["step"] < 5] != [s["prompt"] for s in samples if s["step"] >= 5]


def test_evaluation_samples_at_the_temperature_it_names(world, tmp_path):
    more = {
        "eval__extra_temperatures": [0],
        "eval__reward": "worlds:first_digit",
        "eval__prompts": 40,
        "train__steps": 1,
    }
    summary = run(settings(world, tmp_path / "run", **more))
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    rewards = []
    for line in (world / "prompts.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["prompt"])["input_ids"]])
        with torch.no_grad():
            token = int(model(input_ids=ids).logits[0, -1].argmax())
        rewards.append(token / 10 if token < 10 else 0.0)
    before = summary["student_before"]
    assert before["accuracy_greedy"] == pytest.approx(sum(rewards) / len(rewards))
    assert before["accuracy"] != pytest.approx(before["accuracy_greedy"], abs=1e-3)


def test_recorded_samples_say_who_drew_them(world, tmp_path):
    run(settings(world, tmp_path / "run", train__steps=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {(line["who"], line["source"]) for line in lines} == {("student", "student"), ("teacher", "teacher")}


def test_both_kinds_of_sample_have_metrics_of_their_own(world, tmp_path):
    run(settings(world, tmp_path / "run", rollout__lmbda=0.5, train__prompts_per_step=20))
    for row in steps(tmp_path / "run"):
        assert row["off_policy_share"] == pytest.approx(0.5, abs=0.3)
        total = row["on_policy/tokens"] + row["off_policy/tokens"]
        assert total == row["tokens"]
        mixed = (
            row["on_policy/reverse_kl"] * row["on_policy/tokens"]
            + row["off_policy/reverse_kl"] * row["off_policy/tokens"]
        )
        assert row["reverse_kl"] == pytest.approx(mixed / total, rel=1e-6)


def test_gradient_checkpointing_changes_memory_and_not_the_weights(world, tmp_path):
    for name, on in (("plain", False), ("recompute", True)):
        run(settings(world, tmp_path / name, student__gradient_checkpointing=on, eval__every=0))
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "student").state_dict() for n in ("plain", "recompute"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


@pytest.mark.parametrize(
    "more", [{}, {"objective__divergence": "generalized_jsd", "student__lora__rank": 4, "train__token_fraction": 0.5}]
)
def test_a_loss_of_minimal_memory_changes_the_metrics_by_rounding_alone(world, tmp_path, more):
    for memory in ("fast", "minimal"):
        run(settings(world, tmp_path / memory, train__loss_memory=memory, train__steps=4, eval__every=0, **more))
    for fast, minimal in zip(*(steps(tmp_path / memory) for memory in ("fast", "minimal")), strict=True):
        assert fast.keys() == minimal.keys()
        for name in fast.keys() - {key for key in fast if key.startswith("time/")}:
            assert minimal[name] == pytest.approx(fast[name], rel=1e-4, abs=1e-6), name


def test_a_loss_memory_that_there_is_not_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.loss_memory"):
        build(merge({}, settings(world, tmp_path / "run", train__loss_memory="small")))


def test_lora_trains_adapters_alone_and_saves_the_merged_model_and_the_adapter(world, tmp_path):
    run(settings(world, tmp_path / "run", student__lora__rank=4, optimizer__lr=0.03, eval__every=0))
    start = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").state_dict()
    assert torch.equal(start["model.embed_tokens.weight"], final["model.embed_tokens.weight"]), "embeddings are frozen"
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"], final["model.layers.0.mlp.up_proj.weight"])
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_the_learning_rate_warms_up_and_decays(world, tmp_path):
    more = {
        "optimizer__schedule": "linear",
        "optimizer__warmup_steps": 3,
        "optimizer__lr": 1e-3,
        "optimizer__min_lr_ratio": 0.1,
    }
    run(settings(world, tmp_path / "run", eval__every=0, **more))
    rates = [row["lr"] for row in steps(tmp_path / "run")]
    expected = [0.25, 0.5, 0.75, 1.0, 0.82, 0.64, 0.46, 0.28]
    assert rates == pytest.approx([1e-3 * f for f in expected])


RELEASED = {
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "contradictory, as some released models are": {"do_sample": False, "temperature": 0.6, "top_k": 20},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", RELEASED)
def test_the_student_s_generation_config_survives(world, tmp_path, name, lora):
    shutil.copytree(world / "student", tmp_path / "released")
    path = tmp_path / "released" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | RELEASED[name]))
    more = {"student__lora__rank": 2} if lora else {}
    values = settings(world, tmp_path / "run", student__model=str(tmp_path / "released"), eval__every=0, **more)
    run(values | {"train.steps": 2})
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["top_k"] == 20 and saved["eos_token_id"] == 12


def test_lora_with_gradient_checkpointing_learns(world, tmp_path):
    more = {
        "student__lora__rank": 8,
        "student__gradient_checkpointing": True,
        "optimizer__lr": 0.03,
        "train__steps": 20,
    }
    summary = run(settings(world, tmp_path / "run", eval__every=20, train__prompts_per_step=16, **more))
    assert summary["student_after"]["reverse_kl"] < 0.8 * summary["student_before"]["reverse_kl"]


def test_a_padded_teacher_and_an_unpadded_student_agree_on_the_real_tokens(world, tmp_path):
    """The same weights with 13 and with 64 vocabulary rows: KL must be 0, and the padding rows never matter."""
    student = AutoModelForCausalLM.from_pretrained(world / "student")
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    padded = AutoModelForCausalLM.from_pretrained(world / "student")
    padded.resize_token_embeddings(64, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[13:] = 5.0
        padded.get_output_embeddings().weight[:13] = student.get_output_embeddings().weight
    save_model(padded, tokenizer, tmp_path / "padded")
    values = settings(world, tmp_path / "run", teacher__model=str(tmp_path / "padded"), train__steps=1)
    summary = run(values)
    assert summary["student_before"]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    swapped = settings(world, tmp_path / "swapped", student__model=str(tmp_path / "padded"), train__steps=1)
    swapped["teacher.model"] = str(world / "student")
    assert run(swapped)["student_before"]["reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_each_model_renders_chat_prompts_in_its_own_way(tmp_path):
    """The teacher reads its own template and then the student's tokens: equal weights, another template, another distribution."""
    template = "{%% for m in messages %%}%s{{ m['content'] }}{%% endfor %%}:"
    tokenizers = {
        n: byte_tokenizer(chat_template=template % tag) for n, tag in (("student", "U"), ("teacher", "USER "))
    }
    model = tiny_causal_lm(tokenizers["student"], hidden=32, layers=1, max_positions=64, initializer_range=0.4)
    for name, tokenizer in tokenizers.items():
        save_model(model, tokenizer, tmp_path / name)
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": "a"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = build_parts(build(merge({}, settings(tmp_path, tmp_path / "run"))))
    rollouts = parts.sampler.sample(parts.order.take(0, 4), seed=0)
    for rollout, target in zip(rollouts, parts.teacher.score(rollouts, "dense"), strict=True):
        question = rollout.prompt.messages[0]["content"]
        assert bytes(rollout.prompt_ids).decode() == f"U{question}:"
        seen = [*f"USER {question}:".encode(), *rollout.response_ids]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([seen])).logits[0, -len(rollout.response_ids) - 1 : -1, :258]
        torch.testing.assert_close(target.logits, expected, atol=1e-5, rtol=1e-5)


def test_tensorboard_gets_the_same_numbers(world, tmp_path):
    pytest.importorskip("tensorboard")
    run(settings(world, tmp_path / "run", log__tensorboard=True, eval__every=0, train__steps=2))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_autocast_leaves_the_head_in_float32(world):
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    from opd.data.pack import arrange

    sequences = arrange([[1, 2, 3]], [[4, 5]], layout="packed", pad_id=0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = response_logits(model, sequences)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float()), "the logits were rounded to bfloat16"
