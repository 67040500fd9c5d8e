"""What of verl's config and of two model folders is refused before a worker starts; verl itself is not needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from verl_world import make_models, section

from opd.errors import ConfigError, ModelError, VocabularyError
from opd.integrations.verl.plugin.checks import RunFacts, check_run, remarks
from opd.integrations.verl.plugin.model_checks import common_vocabulary, read_model
from opd.integrations.verl.plugin.settings import parse
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

K1 = {"support": "sampled", "estimator": "k1", "delivery": "advantage"}
K2 = {"support": "sampled", "estimator": "k2"}
TAIL = {"support": "teacher_top_k", "tail": "sampled"}


def settings(**keys):
    return parse(section(teacher={"model": "teacher"}, **keys))[0]


@pytest.mark.parametrize(
    ("keys", "run", "said"),
    [
        ({}, {"native_distillation": True}, "distillation.enabled=false"),
        ({}, {"strategy": "megatron"}, "strategy=fsdp2"),
        ({**K1, "discount": 0.5}, {"sequence_parallel": 2}, "ulysses_sequence_parallel_size=2 cuts a response"),
        ({}, {"native_fused_kernels": True}, "use_fused_kernels=true"),
        ({}, {"sum_pi_squared": True}, "calculate_sum_pi_squared"),
        ({}, {"entropy_coeff": 0.01, "use_kl_loss": True}, "entropy_coeff=0.01 and actor.use_kl_loss=true belongs"),
        ({"rl_weight": 1.0}, {"loss_mode": "on_policy_distillation"}, "names no policy loss"),
        (K2, {"temperature": 0.7}, "opd.objective.student_temperature=1"),
        (K1, {"top_p": 0.9}, "top_p=0.9"),
        ({**K1, "discount": 0.5}, {"temperature": 0.7}, "opd.objective.student_temperature=1"),
        (K1, {"loss_agg_mode": "seq-mean-token-mean"}, "set actor.loss_agg_mode=seq-mean-token-sum-norm"),
        (TAIL, {"loss_agg_mode": "seq-mean-token-mean"}, "with opd.objective.tail=sampled: a token's weight"),
        (
            {**K1, "rl_weight": 1.0, "rl_combine": "advantages"},
            {"loss_agg_mode": "seq-mean-token-mean"},
            "with opd.objective.estimator=k1: a token's weight",
        ),
        (K2, {"loss_agg_mode": "seq-mean-token-sum-norm"}, "set actor.loss_scale_factor=<data.max_response_length>"),
    ],
)
def test_a_config_that_cannot_work_is_refused(keys: dict, run: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        check_run(settings(**keys), RunFacts(**{"strategy": "fsdp2", **run}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "run"),
    [
        ({}, {}),
        ({}, {"strategy": "fsdp", "sequence_parallel": 2}),
        ({}, {"temperature": 0.7, "top_p": 0.9, "loss_mode": "on_policy_distillation"}),
        (K1, {"temperature": 0.7}),
        (K1, {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 1024}),
        (TAIL, {"loss_agg_mode": "seq-mean-token-sum"}),
        ({}, {"loss_agg_mode": "seq-mean-token-mean"}),
        ({"support": "teacher_top_k"}, {"loss_agg_mode": "seq-mean-token-sum-norm"}),
        ({**K1, "rl_weight": 1.0, "rl_distill_weight": 0.0}, {"loss_agg_mode": "seq-mean-token-mean"}),
        ({"rl_weight": 1.0}, {"entropy_coeff": 0.01, "use_kl_loss": True, "loss_mode": "gspo"}),
        ({"rl_weight": 1.0, "rl_distill_weight": 0.0}, {"native_fused_kernels": True, "sequence_parallel": 2}),
    ],
)
def test_a_config_that_works_is_taken(keys: dict, run: dict):
    check_run(settings(**keys), RunFacts(**{"strategy": "fsdp2", **run}))


def test_a_mean_over_tokens_of_a_loss_of_the_sampled_token_is_taken_and_said():
    for keys in (K1, TAIL):
        (said,) = remarks(settings(**keys), RunFacts(strategy="fsdp2"))
        assert "off by about 1 / (responses of a mini-batch)" in said
        assert not remarks(settings(**keys), RunFacts(strategy="fsdp2", loss_agg_mode="token-sum"))
        advised = {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 1024}
        assert not remarks(settings(**keys), RunFacts(strategy="fsdp2", **advised))
        check_run(settings(**keys), RunFacts(strategy="fsdp2", **advised))
    assert not remarks(settings(), RunFacts(strategy="fsdp2"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    digits = digit_tokenizer()
    save_model(tiny_causal_lm(digits, architecture="llama"), digits, folder / "digits")
    return folder


def check_models(student: str, teacher: str):
    return common_vocabulary(
        read_model(student, False, "actor_rollout_ref.model.path"), read_model(teacher, False, "opd.teacher.model")
    )


def test_models_that_fit_share_their_vocabulary(folders: Path):
    assert check_models(str(folders / "student"), str(folders / "teacher")).size == 258


def test_a_teacher_of_another_tokenizer_is_refused(folders: Path):
    with pytest.raises(VocabularyError, match="do not read the same token ids"):
        check_models(str(folders / "student"), str(folders / "digits"))


def test_a_teacher_that_is_not_there_is_refused(folders: Path):
    with pytest.raises(ModelError, match=r"opd\.teacher\.model='/nowhere' cannot be read"):
        check_models(str(folders / "student"), "/nowhere")
