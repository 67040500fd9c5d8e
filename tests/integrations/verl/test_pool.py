"""A teacher in verl's servers: the engine on what they send, against plain transformers; what they are asked for; what is refused."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl_engines import RESPONSE_LENGTHS, TERM, batch, engine, jagged, policy_loss, same, step
from verl_world import section

from opd.errors import ConfigError, ModelError, NonFiniteError, ObjectiveError
from opd.integrations.verl.dry_run.sampling import score
from opd.integrations.verl.plugin.checks import RunFacts, TeacherServers, check_run
from opd.integrations.verl.plugin.settings import TeacherSettings, parse
from opd.integrations.verl.plugin.teachers.served import in_vocabulary, refuse_nonsense, vocabulary_of
from opd.losses import Objective
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import DenseTarget, SampledTarget, Target, TopKTarget

TOKENS = 258  # of the byte tokenizer
POOL = {"placement": "pool", "support": "teacher_top_k"}
K1 = {"support": "sampled", "estimator": "k1", "delivery": "advantage"}


@functools.cache
def plain_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def served(models: Path, top_k: int, *, teacher: str = "teacher", **made):
    """The batch as verl's agent loop leaves it: with what a server answers to `prompt_logprobs=top_k`, sequence by sequence."""
    data = batch(**made)
    answers = [score(plain_model(models / teacher), ids.tolist(), top_k) for ids in data["input_ids"].unbind()]
    data["teacher_ids"] = jagged([torch.tensor(ids, dtype=torch.int32) for ids, _ in answers])
    data["teacher_logprobs"] = jagged([torch.tensor(logps) for _, logps in answers])
    return data


def plainly(models: Path, data, objective: Objective, *, teacher: str = "teacher"):
    """The same loss sequence by sequence from whole logits; the top k are taken here, not read from the batch."""
    learner = AutoModelForCausalLM.from_pretrained(models / "student", attn_implementation="eager", dtype=torch.float32)
    rows = []
    columns = (data[name].unbind() for name in ("prompts", "responses", "old_log_probs", "response_mask"))
    for prompt, response, sampler_logp, mask in zip(*columns, strict=True):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        counted = mask.nonzero().squeeze(-1)  # a masked token has no part in a discounted sum either
        at, response, sampler_logp = len(prompt) - 1 + counted, response[counted], sampler_logp[counted]
        with torch.no_grad():
            teacher_logp = plain_model(models / teacher)(input_ids=ids).logits[0, at].log_softmax(-1)
        sampler = {"sampler_logp": sampler_logp} if objective.support == "sampled" else {}
        loss, _ = objective.per_token_loss(
            learner(input_ids=ids).logits[0, at, :TOKENS],
            _target(teacher_logp, response, objective),
            response,
            sequence_index=torch.zeros_like(response),
            **sampler,
        )
        rows.append(loss.new_zeros(max(RESPONSE_LENGTHS)).index_copy(0, counted, loss))
    mask = data["response_mask"].to_padded_tensor(0)
    total = agg_loss(
        torch.stack(rows), mask, "token-mean", batch_num_tokens=int(mask.sum()), global_batch_size=len(rows), dp_size=1
    )
    total.backward()
    return total.item(), {name: p.grad for name, p in learner.named_parameters()}


def _target(teacher_logp: torch.Tensor, response: torch.Tensor, objective: Objective) -> Target:
    if objective.support == "full":
        return DenseTarget(logits=teacher_logp[:, :TOKENS])
    if objective.support == "sampled":
        return SampledTarget(teacher_logp=teacher_logp.gather(-1, response.unsqueeze(-1)).squeeze(-1))
    top = teacher_logp.topk(objective.top_k, dim=-1)
    return TopKTarget(ids=top.indices, teacher_logp=top.values)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 64},
        {"top_k": 1},
        {"divergence": "forward_kl", "top_k": 16},
        {"divergence": "generalized_jsd", "beta": 0.3, "top_k": 16},
        {"divergence": "skew_reverse_kl", "beta": 0.7, "top_k": 16},
        {"divergence": "forward_kl", "top_k": 16, "tail": "generalized"},
        {"divergence": "reverse_kl", "top_k": 16, "tail": "renormalize"},
        {"divergence": "reverse_kl", "top_k": 16, "student_temperature": 1.5},
        K1,
        {**K1, "discount": 0.5, "clip_range": 0.2},
        {"support": "sampled", "estimator": "k2"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_loss_and_every_gradient_are_those_of_plain_transformers(models: Path, settings: dict):
    objective = Objective(**{"support": "teacher_top_k", **settings})
    data = served(models, 0 if objective.support == "sampled" else objective.top_k, hide=((2, 3),))
    loss, gradients, _ = step(engine(models, **{**POOL, **settings}), data)
    expected, plain_gradients = plainly(models, data, objective)
    assert loss == pytest.approx(expected, rel=1e-6, abs=TERM)
    same(gradients, plain_gradients)


def test_all_tokens_of_a_larger_vocabulary_are_the_exact_divergence_over_the_common_one(models: Path):
    """The teacher has 320 rows, of which 258 are tokens: what it gives to the others is shared out."""
    wide = {"teacher": {"model": str(models / "wide")}}
    loss, gradients, _ = step(engine(models, **POOL, **wide, top_k=320), served(models, 320, teacher="wide"))
    expected, plain_gradients = plainly(models, batch(), Objective(), teacher="wide")
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, plain_gradients)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_make_no_difference(models: Path, size: int):
    built = engine(models, **POOL, top_k=16)
    whole, gradients, metrics = step(built, served(models, 16))
    parts, part_gradients, part_metrics = step(built, served(models, 16, micro_batch_size=size))
    assert parts == pytest.approx(whole, rel=1e-6)
    same(part_gradients, gradients)
    assert part_metrics == pytest.approx(metrics, rel=1e-5)


def test_padded_rows_are_packed_ones(models: Path):
    packed, gradients, _ = step(engine(models, **POOL, top_k=16), served(models, 16))
    built = engine(models, remove_padding=False, **POOL, top_k=16)
    padded, padded_gradients, _ = step(built, served(models, 16, remove_padding=False))
    assert padded == pytest.approx(packed, rel=1e-6)
    same(padded_gradients, gradients)


def test_hybrid_adds_verls_policy_loss_and_not_its_distillation(models: Path):
    """With teacher servers verl binds its distillation loss in; of that, the policy loss alone is used."""
    config = policy_loss().keywords["config"]
    bound = functools.partial(distillation_ppo_loss, config=config, distillation_config=None)
    distilled, gradients, _ = step(engine(models, **POOL, top_k=16), served(models, 16))
    stock, stock_gradients, _ = step(engine(models, rl_weight=1.0, rl_distill_weight=0.0), batch())
    built = engine(models, **POOL, top_k=16, rl_weight=0.7, rl_distill_weight=0.2)
    both, both_gradients, metrics = step(built, served(models, 16), bound)
    assert both == pytest.approx(0.7 * stock + 0.2 * distilled, rel=1e-5)
    same(both_gradients, {name: 0.7 * stock_gradients[name] + 0.2 * g for name, g in gradients.items()})
    assert not any(name.startswith("distillation/") for name in metrics)


def test_the_pool_holds_no_teacher_in_the_worker(models: Path):
    built = engine(models, **POOL, top_k=16)
    students = sum(p.numel() for p in plain_model(models / "student").parameters())
    assert sum(p.numel() for p in built.module.parameters()) == students
    assert not [v for v in vars(built.teachers).values() if isinstance(v, torch.nn.Module)]


def test_a_batch_without_teacher_scores_is_refused(models: Path):
    with pytest.raises(ConfigError, match=r"no teacher_ids and no teacher_logprobs.*\+opd=pool"):
        step(engine(models, **POOL, top_k=16), batch())


def test_scores_of_another_width_are_refused(models: Path):
    with pytest.raises(ModelError, match="sent 8 log-probs per token, and opd asked for 16"):
        step(engine(models, **POOL, top_k=16), served(models, 8))


def test_a_server_that_shifts_its_scores_is_refused(models: Path):
    data = served(models, 0)
    data["teacher_ids"] = jagged([ids.roll(1, 0) for ids in data["teacher_ids"].unbind()])
    with pytest.raises(ModelError, match="scored other tokens than were sampled"):
        step(engine(models, **{**POOL, **K1}), data)


def test_scores_that_are_nan_stop_before_an_update(models: Path):
    data = served(models, 16)
    data["teacher_logprobs"].values()[6] = torch.nan
    with pytest.raises(NonFiniteError, match="no update was made"):
        step(engine(models, **POOL, top_k=16), data)


def test_probabilities_above_1_are_refused():
    with pytest.raises(ModelError, match=r"add up to 1\.2 at one position"):
        refuse_nonsense(torch.tensor([[3, 4]]), torch.tensor([[0.7, 0.5]]).log(), "t")
    refuse_nonsense(torch.tensor([[3, 3]]), torch.tensor([[0.7, 0.7]]).log(), "t")  # one token, told twice


def test_a_server_without_weights_is_refused(models: Path):
    data = served(models, 16)
    data["teacher_logprobs"].values().fill_(-5.0)
    with pytest.raises(ModelError, match="every token the same probability"):
        step(engine(models, **POOL, top_k=16), data)


def test_tokens_that_the_student_lacks_leave_their_probability_to_the_others():
    """Probabilities 1/2, 1/4, 1/8 of tokens 9, 1 and 2; of those, 9 is no token of the student's."""
    target = in_vocabulary(torch.tensor([[9, 1, 2]]), torch.tensor([[0.5, 0.25, 0.125]]).log(), VocabularyMatch(size=5))
    assert target.ids.tolist() == [[1, 2, 1]]
    assert target.teacher_logp.exp().tolist() == [pytest.approx([0.5, 0.25, 0.0])]
    holes = in_vocabulary(
        torch.tensor([[9, 1, 2]]), torch.tensor([[0.5, 0.25, 0.125]]).log(), VocabularyMatch(size=10, invalid_ids=(1,))
    )
    assert holes.ids.tolist() == [[9, 2, 9]]
    assert holes.teacher_logp.exp().tolist() == [pytest.approx([2 / 3, 1 / 6, 0.0])]
    with pytest.raises(ModelError, match="unknown to the student"):
        in_vocabulary(torch.tensor([[9, 8]]), torch.tensor([[0.5, 0.25]]).log(), VocabularyMatch(size=5))


def test_scores_are_about_the_token_after_each(models: Path):
    model, ids = plain_model(models / "teacher"), [10, 20, 30]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    tokens, said = score(model, ids, 0)
    assert tokens == [[20], [30], [0]]
    assert [row[0] for row in said] == pytest.approx([float(logp[0, 20]), float(logp[1, 30]), 0.0], abs=1e-6)
    tokens, said = score(model, ids, 2)
    assert tokens[:2] == logp[:2].topk(2).indices.tolist() and tokens[2] == [0, 0]
    assert said[1] == pytest.approx(logp[1].topk(2).values.tolist(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"lower opd\.objective\.top_k"):
        score(model, ids, 1000)


def composed(*overrides: str):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", ["+opd=pool", "opd.teacher.model=/teacher", *overrides])


@pytest.mark.parametrize("native", ["loss_mode=k3", "loss_mode=k1", "loss_mode=forward_kl_topk", "topk=7"])
@pytest.mark.parametrize(
    ("asked", "use_topk", "topk"),
    [
        (("opd.objective.top_k=24",), True, 24),
        (
            ("opd.objective.support=sampled", "opd.objective.estimator=k1", "opd.objective.delivery=advantage"),
            False,
            None,
        ),
    ],
)
def test_the_servers_are_asked_for_what_the_objective_reads(native: str, asked: tuple, use_topk: bool, topk: int):
    config = composed(*asked, f"distillation.distillation_loss.{native}", "actor_rollout_ref.rollout.name=vllm")
    made = omega_conf_to_dataclass(config.distillation)
    assert (made.distillation_loss.loss_settings.use_topk, made.distillation_loss.topk) == (use_topk, topk)
    (teacher,) = made.teacher_models.values()
    assert teacher.model_path == "/teacher"
    assert teacher.inference.engine_kwargs.get("vllm", {}).get("max_logprobs") == topk


def test_the_transformers_server_of_a_cpu_is_a_teacher_too():
    made = omega_conf_to_dataclass(composed("actor_rollout_ref.rollout.name=transformers").distillation)
    assert [teacher.inference.name for teacher in made.teacher_models.values()] == ["transformers"]


def test_the_facts_of_the_pool_reach_the_driver():
    config = composed(
        "actor_rollout_ref.rollout.name=vllm",
        "+distillation.teacher_models.teacher_model.inference.engine_kwargs.vllm.max_logprobs=20",
    )
    facts = config.actor_rollout_ref.actor.opd_run.pool
    assert dict(facts) == {
        "engine": "vllm",
        "model_path": "/teacher",
        "teachers": ["teacher_model"],
        "tensor_parallel": 1,
        "max_logprobs": 20,
    }


SERVED = {"strategy": "fsdp2", "native_distillation": True}
VLLM = TeacherServers(engine="vllm", model_path="teacher")


@pytest.mark.parametrize(
    ("keys", "run", "said"),
    [
        ({"support": "full"}, {}, "use support=teacher_top_k with tail=bucket"),
        ({"support": "union"}, {}, "tokens that the student chooses"),
        ({"always_include": (1,)}, {}, "drop always_include"),
        ({"teacher_temperature": 2.0}, {}, "set teacher_temperature=1"),
        ({"tail": "sampled"}, {}, "opd.objective.tail=sampled"),
        ({"include_sampled": True}, {}, "opd.objective.include_sampled"),
        ({**K1, "baseline": "value"}, {}, "baseline=none"),
        ({}, {"pool": None}, "use +opd=pool"),
        ({}, {"native_distillation": False}, "use +opd=pool"),
        ({}, {"pool": TeacherServers(engine="vllm", model_path="teacher", max_logprobs=20)}, "max_logprobs=64"),
        ({}, {"pool": TeacherServers(engine="trtllm", model_path="teacher")}, "inference.name=vllm"),
        ({}, {"pool": TeacherServers(engine="vllm", model_path="other")}, "opd.teacher.model=teacher"),
        ({}, {"pool": TeacherServers(engine="vllm", model_path="t", teachers=("teacher_model", "b"))}, "one teacher"),
        ({"rl_weight": 1.0, "rl_distill_weight": 0.0}, {}, "opd.rl.distill_weight=0"),
        ({"teacher": {"model": "teacher", "offload": True}}, {}, "opd.teacher.offload"),
    ],
)
def test_what_a_pool_cannot_feed_is_refused(keys: dict, run: dict, said: str):
    settings, _ = parse(section(**{"teacher": {"model": "teacher"}, **POOL, **keys}))
    with pytest.raises((ConfigError, ObjectiveError)) as caught:
        check_run(settings, RunFacts(**{**SERVED, "pool": VLLM, **run}))
    assert said in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"tail": "generalized"}, K1, {"rl_weight": 0.5, "divergence": "forward_kl"}])
def test_what_a_pool_can_feed_is_taken(keys: dict):
    settings, _ = parse(section(**{"teacher": {"model": "teacher"}, **POOL, **keys}))
    check_run(settings, RunFacts(**SERVED, pool=VLLM))


def test_a_student_with_a_tokenizer_of_its_own_shares_the_teachers_vocabulary(models: Path, tmp_path: Path):
    """In the worker, where verl's model config has read it from model.tokenizer_path."""
    bare, words = tmp_path / "bare", tmp_path / "words"
    for folder, keeps in ((bare, lambda name: "token" not in name), (words, lambda name: "token" in name)):
        folder.mkdir()
        for file in filter(lambda file: keeps(file.name), (models / "student").iterdir()):
            shutil.copy(file, folder / file.name)
    student = HFModelConfig(path=str(bare), tokenizer_path=str(words))
    teacher = TeacherSettings(model=str(models / "teacher"))
    assert vocabulary_of(teacher, SimpleNamespace(model_config=student)).size == 258
