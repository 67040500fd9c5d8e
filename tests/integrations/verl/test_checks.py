"""What of verl's config and of two model folders is refused before a worker starts; verl itself is not needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from verl_world import make_models

from opd.errors import ConfigError, ModelError, VocabularyError
from opd.integrations.verl.plugin.checks import Run, check_run, common_vocabulary, notes, read_model
from opd.integrations.verl.plugin.settings import parse
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

K1 = {"support": "sampled", "estimator": "k1", "delivery": "advantage"}
K2 = {"support": "sampled", "estimator": "k2"}
TAIL = {"support": "teacher_top_k", "tail": "sampled"}


def settings(**section):
    return parse({"teacher": {"model_path": "teacher"}, **section})[0]


@pytest.mark.parametrize(
    ("section", "run", "said"),
    [
        ({}, {"native_distillation": True}, "distillation.enabled=false"),
        ({}, {"strategy": "megatron"}, "strategy=fsdp2"),
        ({**K1, "discount": 0.5}, {"sequence_parallel": 2}, "ulysses_sequence_parallel_size=2 cuts a response"),
        ({}, {"native_fused_kernels": True}, "use_fused_kernels=true"),
        ({}, {"sum_pi_squared": True}, "calculate_sum_pi_squared"),
        ({}, {"entropy_coeff": 0.01, "use_kl_loss": True}, "entropy_coeff=0.01 and actor.use_kl_loss=true belongs"),
        ({"lambda_rl": 1.0}, {"loss_mode": "on_policy_distillation"}, "names no policy loss"),
        (K2, {"temperature": 0.7}, "opd.student_temperature=1"),
        (K1, {"top_p": 0.9}, "top_p=0.9"),
        ({**K1, "discount": 0.5}, {"temperature": 0.7}, "opd.student_temperature=1"),
        (K1, {"loss_agg_mode": "seq-mean-token-mean"}, "set actor.loss_agg_mode=seq-mean-token-sum-norm"),
        (TAIL, {"loss_agg_mode": "seq-mean-token-mean"}, "with opd.tail=sampled: a token's weight"),
        (
            {**K1, "lambda_rl": 1.0, "hybrid": "advantages"},
            {"loss_agg_mode": "seq-mean-token-mean"},
            "with opd.estimator=k1: a token's weight",
        ),
        (K2, {"loss_agg_mode": "seq-mean-token-sum-norm"}, "set actor.loss_scale_factor=<data.max_response_length>"),
    ],
)
def test_a_config_that_cannot_work_is_refused(section: dict, run: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        check_run(settings(**section), Run(**{"strategy": "fsdp2", **run}))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("section", "run"),
    [
        ({}, {}),
        ({}, {"strategy": "fsdp", "sequence_parallel": 2}),
        ({}, {"temperature": 0.7, "top_p": 0.9, "loss_mode": "on_policy_distillation"}),
        (K1, {"temperature": 0.7}),
        (K1, {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 1024}),
        (TAIL, {"loss_agg_mode": "seq-mean-token-sum"}),
        ({}, {"loss_agg_mode": "seq-mean-token-mean"}),
        ({"support": "teacher_top_k"}, {"loss_agg_mode": "seq-mean-token-sum-norm"}),
        ({**K1, "lambda_rl": 1.0, "lambda_distill": 0.0}, {"loss_agg_mode": "seq-mean-token-mean"}),
        ({"lambda_rl": 1.0}, {"entropy_coeff": 0.01, "use_kl_loss": True, "loss_mode": "gspo"}),
        ({"lambda_rl": 1.0, "lambda_distill": 0.0}, {"native_fused_kernels": True, "sequence_parallel": 2}),
    ],
)
def test_a_config_that_works_is_taken(section: dict, run: dict):
    check_run(settings(**section), Run(**{"strategy": "fsdp2", **run}))


def test_a_mean_over_tokens_of_a_loss_of_the_sampled_token_is_taken_and_said():
    for section in (K1, TAIL):
        (said,) = notes(settings(**section), Run(strategy="fsdp2"))
        assert "off by about 1 / (responses of a mini-batch)" in said
        assert not notes(settings(**section), Run(strategy="fsdp2", loss_agg_mode="token-sum"))
        advised = {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 1024}
        assert not notes(settings(**section), Run(strategy="fsdp2", **advised))
        check_run(settings(**section), Run(strategy="fsdp2", **advised))
    assert not notes(settings(), Run(strategy="fsdp2"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"))
    digits = digit_tokenizer()
    save_model(tiny_causal_lm(digits, architecture="llama"), digits, folder / "digits")
    return folder


def check_models(student: str, teacher: str):
    (config, tokenizer), (other_config, other) = (
        read_model(path, False, key)
        for path, key in ((student, "actor_rollout_ref.model.path"), (teacher, "opd.teacher.model_path"))
    )
    return common_vocabulary(student, teacher, config, other_config, tokenizer, other)


def test_models_that_fit_share_their_vocabulary(folders: Path):
    assert check_models(str(folders / "student"), str(folders / "teacher")).size == 258


def test_a_teacher_of_another_tokenizer_is_refused(folders: Path):
    with pytest.raises(VocabularyError, match="do not read the same token ids"):
        check_models(str(folders / "student"), str(folders / "digits"))


def test_a_teacher_that_is_not_there_is_refused(folders: Path):
    with pytest.raises(ModelError, match=r"opd\.teacher\.model_path='/nowhere' cannot be read"):
        check_models(str(folders / "student"), "/nowhere")
