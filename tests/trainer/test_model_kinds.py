"""Models that differ from the plain case in ways that would spoil a run silently: refused, or handled."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from mixing_models import APART, MIXING, tiny
from opd.config import LoraConfig, OptimizerConfig
from opd.config.recipe import build, merge
from opd.data.pack import layout_sequences, pack
from opd.data.rendering import Renderer
from opd.doctor.checks import check_packing
from opd.errors import ConfigError, DataError, ModelError
from opd.losses import Objective
from opd.models import linear_head, response_hidden, response_logits
from opd.optim.build import build_optimizer
from opd.reporting.record import read_metrics
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, random_logits, random_rollout, save_model, tiny_causal_lm
from opd.trainer.evaluate import _mean_over_prompts, _reward_interval
from opd.trainer.from_config import RunComponents
from opd.trainer.lora import add_lora
from opd.trainer.metrics import TokenMetrics
from opd.trainer.policy import Policy
from opd.trainer.run import train
from opd.trainer.student import Student
from opd.types import DenseTarget, Prompt
from worlds import settings


def run(values: dict[str, object]) -> dict | None:
    return train(build(merge({}, values)))


def tiny_opt(**more: float) -> OPTForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=40, max_position_embeddings=64, init_std=0.5, **shape, **more)).eval()


def tiny_gemma2(tokens: int, cap: float | None = 30.0) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tokens, num_key_value_heads=1, initializer_range=0.5, final_logit_softcapping=cap, **shape
        )
    ).eval()


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_models_that_keep_packed_sequences_apart_pass(architecture):
    check_packing(tiny_causal_lm(40, architecture=architecture, initializer_range=0.3), "student", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", APART)
def test_attention_keeps_packed_sequences_apart_in_either_precision(kind: str, dtype: torch.dtype):
    check_packing(tiny(kind, 40, dtype=dtype), "student", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_a_state_that_leaks_from_sequence_to_sequence_is_found_however_small(kind: str, dtype: torch.dtype):
    """At transformers' own initialisation, where a convolution moves a logit by less than a thousandth of its spread."""
    with pytest.raises(ConfigError, match=r"(?s)packed.*see each other.*right_padded"):
        check_packing(tiny(kind, 40, dtype=dtype), "teacher", 0)


def test_a_model_that_mixes_packed_sequences_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)packed.*OPTForCausalLM.*see each other.*right_padded"):
        check_packing(tiny_opt(), "student", 0)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supply", ["hidden", "dense", "top_k"])
def test_bfloat16_twins_differ_by_exactly_nothing(supply):
    """The head of half-precision weights is multiplied in float32 on both sides."""
    model = tiny_causal_lm(byte_tokenizer(), initializer_range=0.3, max_positions=64).to(torch.bfloat16)
    vocabulary = VocabularyMatch(size=258)
    renderer = Renderer(byte_tokenizer(), name="twin")
    teacher = LocalTeacher(copy.deepcopy(model), renderer, vocabulary=vocabulary, pad_id=256, supply=supply)
    objective = Objective(support="teacher_top_k", top_k=8) if supply == "top_k" else Objective()
    teacher.bind_objective(objective)
    rollouts = []
    for i, length in enumerate((3, 9)):
        prompt = Prompt(index=i, text="question"[: 3 + i])
        rollout = random_rollout(1, length, 256, seed=i)
        rollouts.append(dataclasses.replace(rollout, prompt=prompt, prompt_ids=renderer.prompt_ids(prompt)))
    policy = Policy(model, vocabulary=vocabulary, eos_ids=(257,), teacher_logits=teacher.logits)
    (batch,) = pack(rollouts, teacher.score(rollouts), layout="right_padded", tokens_per_microbatch=9999, pad_id=256)
    metrics = TokenMetrics()
    assert policy.loss(batch, objective, metrics).item() == 0.0
    assert all(float(values.abs().max()) == 0.0 for _, values in metrics.per_rollout("reverse_kl"))


def test_logits_of_bfloat16_weights_are_not_rounded_to_bfloat16():
    model = tiny_causal_lm(40, initializer_range=0.3).to(torch.bfloat16)
    sequences = layout_sequences([[1, 2, 3]], [[4, 5]], layout="packed", pad_id=0)
    with torch.no_grad():
        logits, hidden = response_logits(model, sequences), response_hidden(model, sequences)
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("tokens", [64, 1 << 20])
def test_adapters_on_a_float16_student_get_the_gradient_of_any_number_of_tokens(tokens):
    """1/N of a million tokens is below float16's smallest number by the time it is in the body."""
    norms = {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_causal_lm(40, layers=2, initializer_range=0.3).to(torch.float16).to(dtype)
        student = Student(
            add_lora(model, LoraConfig(rank=4), seed=0),
            OptimizerConfig(lr=1e-3, warmup_steps=0),
            vocabulary=VocabularyMatch(size=40),
            eos_ids=(0,),
            teacher_logits=lambda target: target.hidden,
            total_steps=4,
        )
        rollouts = [random_rollout(4, 9, 40, seed=i, index=i) for i in range(4)]
        targets = [DenseTarget(logits=random_logits(9, 40, seed=i)) for i in range(4)]
        batches = pack(rollouts, targets, layout="packed", tokens_per_microbatch=30, pad_id=0, global_count=tokens)
        norms[dtype] = [student.update(batches, Objective()).metrics["grad_norm"] for _ in range(2)]
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=0.02)
    assert norms[torch.float16][0] * tokens > 0.1


def test_half_precision_students_are_refused_or_remarked_upon(world, tmp_path):
    with pytest.raises(ConfigError, match=r"float16 cannot be trained"):
        build(merge({}, settings(world, tmp_path, student__dtype="float16")))
    parts = RunComponents(build(merge({}, settings(world, tmp_path, student__dtype="bfloat16"))))
    assert any("rounds away updates" in warning for warning in parts.warnings)


# --- heads that are more than a product -------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.1, 30.0])
def test_a_soft_capped_head_is_never_offered_as_hidden_states(cap):
    """Also where the cap hardly shows at the size of this model's own logits."""
    model = tiny_gemma2(20, cap)
    assert linear_head(model) is None
    assert linear_head(tiny_gemma2(20, None)) is not None
    with torch.no_grad():
        logits = response_logits(model, layout_sequences([[1, 2, 3]], [[4, 5]], layout="packed", pad_id=0))
        expected = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[0, 2:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_soft_capped_teacher_is_distilled_through_its_whole_logits(world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    model = tiny_gemma2(13)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 12, 11
    model.config.eos_token_id = 12
    save_model(model, tokenizer, tmp_path / "gemma")
    values = settings(world, tmp_path / "run", teacher__model=str(tmp_path / "gemma"), train__steps=40, eval__every=40)
    values |= {"train.prompts_per_step": 16, "optimizer.lr": 0.01}
    parts = RunComponents(build(merge({}, values)))
    assert parts.teacher.kind == "dense"
    summary = run(values)
    assert summary["student_after"]["reverse_kl"] < 0.8 * summary["student_before"]["reverse_kl"]
    assert summary["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-6)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", ["q_proj,lm_head", "q_proj,embed_tokens"])
def test_adapters_on_tied_embeddings_are_refused(modules):
    model = tiny_causal_lm(40, tie=True)
    with pytest.raises(ConfigError, match=r"share one matrix"):
        add_lora(model, LoraConfig(rank=2, target_modules=modules), seed=0)


def test_adapters_start_from_the_seed_and_from_nothing_else():
    def first_weights(noise: int, seed: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = add_lora(tiny_causal_lm(40), LoraConfig(rank=2), seed=seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(first_weights(1, 0), first_weights(2, 0))
    assert not torch.equal(first_weights(1, 0), first_weights(1, 1))


def test_an_adapter_folder_is_no_student(world, tmp_path):
    run(settings(world, tmp_path / "run", student__lora__rank=2, train__steps=1, eval__every=0))
    shutil.copytree(world / "student", tmp_path / "mixed")
    for file in (tmp_path / "run" / "adapter").iterdir():
        shutil.copy(file, tmp_path / "mixed" / file.name)
    with pytest.raises(ModelError, match=r"is a LoRA adapter.*merge_and_unload"):
        run(settings(world, tmp_path / "next", student__model=str(tmp_path / "mixed")))


# --- dropout and optimizers -------------------------------------------------------------------------------------------


def test_layer_dropout_stays_off_while_layers_recompute():
    """OPT drops whole layers in training mode; only the recomputing layers themselves may be in that mode."""
    student = Student(
        tiny_opt(layerdrop=0.9, dropout=0.9),
        OptimizerConfig(),
        vocabulary=VocabularyMatch(size=40),
        eos_ids=(0,),
        teacher_logits=lambda target: target.hidden,
        total_steps=1,
        gradient_checkpointing=True,
    )
    (batch,) = pack([random_rollout(3, 6, 40)], None, layout="right_padded", tokens_per_microbatch=999, pad_id=0)
    expected = student.logits(batch)
    with student._training():
        assert any(module.training for module in student.model.modules()), "nothing would be recomputed"
        for _ in range(3):
            assert torch.equal(student.logits(batch), expected)
    assert not any(module.training for module in student.model.modules())


def test_muon_leaves_every_embedding_to_adamw():
    model = tiny_causal_lm(40, architecture="gpt2")
    muon, adamw = build_optimizer(model, OptimizerConfig(name="muon"))
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    in_adamw = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert len(embeddings) == 2 and embeddings <= in_adamw and not embeddings & in_muon
    assert in_muon | in_adamw == {id(p) for p in model.parameters()} and not in_muon & in_adamw


# --- evaluation, metrics, records -------------------------------------------------------------------------------------


def test_repeated_samples_of_a_prompt_are_one_observation():
    """Eight prompts failed once, or failed sixteen times each: the second knows hardly more about prompts."""
    once, often = _reward_interval([0.0] * 8, 1), _reward_interval([1.0, 0.0] * 8, 2)
    assert once[1][1] == pytest.approx(0.324, abs=1e-3)
    assert often == (0.5, (0.5, 0.5))
    copies = [value for value in (0.1, 0.5, 0.9, 0.3) for _ in range(16)]
    (mean, interval), (expected_mean, expected) = (
        _mean_over_prompts(copies, 16),
        _mean_over_prompts([0.1, 0.5, 0.9, 0.3], 1),
    )
    assert mean == pytest.approx(expected_mean) and interval == pytest.approx(expected)


def test_a_teacher_with_a_template_of_its_own_is_at_no_distance_from_itself(tmp_path):
    template = "{%% for m in messages %%}%s{{ m['content'] }}{%% endfor %%}:"
    model = tiny_causal_lm(byte_tokenizer(), hidden=32, layers=1, max_positions=64, initializer_range=0.4)
    for name, tag in (("student", "U"), ("teacher", "USER ")):
        save_model(model, byte_tokenizer(chat_template=template % tag), tmp_path / name)
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": "a"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = run(settings(tmp_path, tmp_path / "run", train__steps=1))
    assert summary["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-7)
    assert summary["student_before"]["reverse_kl"] > 1e-3


def test_the_sampler_gap_is_shown_only_where_it_means_something(world, tmp_path):
    run(settings(world, tmp_path / "plain", train__steps=1, eval__every=0))
    run(settings(world, tmp_path / "cool", train__steps=1, eval__every=0, rollout__temperature=0.5))
    plain, cool = (read_metrics(tmp_path / name)[0].metrics for name in ("plain", "cool"))
    assert plain["sampler_student_gap"] < 1e-5
    assert "sampler_student_gap" not in cool


def test_recorded_samples_are_the_first_ones_and_not_the_longest(world, tmp_path):
    config = build(merge({}, settings(world, tmp_path / "run", train__steps=1, eval__every=0, log__samples=5)))
    train(config)
    parts = RunComponents(config)
    prompts = [p for p in parts.schedule.take(0, 6) for _ in range(2)][:5]
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [p.text for p in prompts]


# --- what one teacher cannot do ------------------------------------------------------------------------------------------


def test_prompts_for_several_teachers_are_not_scored_by_one_in_silence(world, tmp_path):
    rows = [{"prompt": "1>", "answer": "1", "teacher": name} for name in ("math", "code")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=r"name 2 teachers \(code, math, …\), and a run has one"):
        run(settings(world, tmp_path / "run", prompts__path=str(tmp_path / "prompts.jsonl")))


def test_a_discounted_return_is_refused_where_later_tokens_are_not_the_student_s(world, tmp_path):
    k1 = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
    build(merge({}, settings(world, tmp_path, objective__discount=1.0, **k1)))
    for more in ({"rollout__temperature": 0.5}, {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"}):
        with pytest.raises(ConfigError, match=r"discount=1.0 adds what later tokens earn"):
            build(merge({}, settings(world, tmp_path, objective__discount=1.0, **k1, **more)))
