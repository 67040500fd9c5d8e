"""`opd verl smoke`: what it replaces, and what it finds wrong in a user's config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from verl_world import REWARD, make_prompts

from opd.cli.verl import _split
from opd.errors import ConfigError, DataError, OpdError
from opd.integrations.verl.dry_run.compose import ConfigOverrides, compose, literal, read_words
from opd.integrations.verl.dry_run.shrink_config import check_given, check_sizes, replace, requested_models
from opd.integrations.verl.dry_run.smoke import _Run
from opd.integrations.verl.dry_run.tiny_models import RequestedModel, StandIn, make_models
from opd.integrations.verl.plugin.model_checks import shrink
from opd.integrations.verl.plugin.settings import parse
from opd.testing import byte_tokenizer

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
CLUSTER = [
    "+opd=default",
    "opd.teacher.model=/nfs/teacher",
    "algorithm.adv_estimator=grpo",
    "data.train_files=/nfs/train.parquet",
    "data.train_batch_size=1024",
    "data.max_prompt_length=1024",
    "data.max_response_length=8192",
    "actor_rollout_ref.model.path=/nfs/student",
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.n=8",
    f"{ROLLOUT}.tensor_model_parallel_size=4",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=16",
    f"{ACTOR}.ppo_mini_batch_size=256",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=8",
    f"{ACTOR}.fsdp_config.param_offload=true",
    "trainer.nnodes=4",
]
"""As somebody would start it on four machines of eight GPUs."""


def composed(*more: str):
    return compose(read_words([*CLUSTER, *more]))


def checked(*more: str) -> None:
    config = composed(*more)
    check_given(config)
    check_sizes(config)


def replaced(folder: Path, *more: str) -> tuple[ConfigOverrides, OmegaConf]:
    """What is replaced, and the config that comes out; the models are not made."""
    config = composed(*more)
    models = [
        StandIn(requested=one, folder=f"/made/{one.role}", description="", readable=False)
        for one in requested_models(config)
    ]
    done = replace(config, models, folder=folder, steps=2)
    return done, compose(read_words([*CLUSTER, *more]), done.overrides())


def test_ratios_of_batches_are_kept(tmp_path: Path):
    _, here = replaced(tmp_path)
    actor, rollout = here.actor_rollout_ref.actor, here.actor_rollout_ref.rollout
    assert (here.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (4, 2, 2)
    assert actor.ppo_micro_batch_size_per_gpu == 2  # of 4 samples: two micro-batches, as there are eight
    assert rollout.log_prob_micro_batch_size_per_gpu == 4  # of 8 samples
    assert (here.data.max_prompt_length, rollout.prompt_length, rollout.response_length) == (64, 64, 16)


def test_one_update_of_one_micro_batch_stays_one(tmp_path: Path):
    more = [f"{ACTOR}.ppo_mini_batch_size=1024", f"{ACTOR}.ppo_micro_batch_size_per_gpu=256", f"{ROLLOUT}.n=1"]
    _, here = replaced(tmp_path, *more)
    actor = here.actor_rollout_ref.actor
    assert (here.data.train_batch_size, here.actor_rollout_ref.rollout.n) == (4, 1)
    assert (actor.ppo_mini_batch_size, actor.ppo_micro_batch_size_per_gpu) == (4, 4)


def test_tokens_per_gpu_hold_the_longest_sequence(tmp_path: Path):
    _, here = replaced(tmp_path, f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ppo_max_token_len_per_gpu=10000")
    assert here.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 160  # half of 4 samples of 80 tokens


def test_the_cluster_becomes_one_process_on_a_cpu(tmp_path: Path):
    done, here = replaced(tmp_path)
    assert (here.trainer.nnodes, here.trainer.n_gpus_per_node, here.trainer.device) == (1, 1, "cpu")
    assert (here.actor_rollout_ref.rollout.name, here.actor_rollout_ref.rollout.tensor_model_parallel_size) == (
        "transformers",
        1,
    )
    assert here.actor_rollout_ref.actor.fsdp_config.param_offload is False
    assert here.trainer.logger == ["console", "file"]
    assert ("machine", "4 × 8 × cuda", "one process on the CPU, float32") in done.rows


def test_a_rule_that_would_stop_the_run_warns_in_a_dry_run(tmp_path: Path):
    done, here = replaced(tmp_path, "opd.guard.truncated.action=stop", "opd.guard.length.action=off")
    assert (here.opd.guard.truncated.action, here.opd.guard.length.action) == ("warn", "off")
    assert [row[1] for row in done.rows if row[0] == "guard"] == ["opd.guard.truncated.action=stop"]


@pytest.mark.parametrize("mode", ["opd_colocate_async", "opd_separate_async"])
def test_an_asynchronous_trainer_becomes_the_synchronous_one_with_the_same_rules(tmp_path: Path, mode: str):
    _, here = replaced(tmp_path, f"trainer.v1.trainer_mode={mode}")
    assert here.trainer.v1.trainer_mode == "opd_sync"
    assert replaced(tmp_path)[1].trainer.v1.trainer_mode == "opd_sync"


def test_what_the_user_said_of_the_objective_stays(tmp_path: Path):
    _, here = replaced(
        tmp_path, "opd.objective.divergence=forward_kl", "opd.rl.weight=0.5", f"{ACTOR}.loss_agg_mode=token-sum"
    )
    assert (here.opd.objective.divergence, here.opd.rl.weight) == ("forward_kl", 0.5)
    assert here.actor_rollout_ref.actor.loss_agg_mode == "token-sum"
    assert here.opd.teacher.model == "/made/teacher"


def test_a_library_of_the_users_is_imported_too(tmp_path: Path):
    _, here = replaced(tmp_path, "actor_rollout_ref.model.external_lib=my_library")
    text = (tmp_path / f"{here.actor_rollout_ref.model.external_lib}.py").read_text()
    assert text == "import my_library\nimport opd.integrations.verl.dry_run.register\n"


def test_data_and_reward_that_are_here_are_used(tmp_path: Path):
    data = make_prompts(tmp_path / "own.parquet", rows=2000)
    (tmp_path / "own.py").write_text(REWARD)
    more = [f"data.train_files=[{data}]", f"reward.custom_reward_function.path={tmp_path}/own.py"]
    done, here = replaced(tmp_path, *more)
    assert here.data.train_files == [str(data)]
    assert here.data.train_max_samples == 64
    assert here.reward.custom_reward_function.path == f"{tmp_path}/own.py"
    assert ("prompts", str(data), "64 of 2000 prompts") in done.rows


def test_data_and_reward_that_are_not_here_are_made_up(tmp_path: Path):
    done, here = replaced(tmp_path, "custom_reward_function.path=/nfs/reward.py")
    assert here.data.train_files == [str(tmp_path / "prompts.parquet")]
    assert here.custom_reward_function.path is None
    assert here.reward.custom_reward_function.path == str(tmp_path / "reward.py")
    assert ("reward", "/nfs/reward.py", "not on this machine: the share of digits") in done.rows


def test_made_up_prompts_go_to_every_routed_teacher(tmp_path: Path):
    import pyarrow.parquet as pq

    teachers = ["+opd.teachers.math.model=/nfs/math", "+opd.teachers.code.model=/nfs/code"]
    words = [word for word in CLUSTER if "opd.teacher." not in word]
    config = compose(read_words([*words, *teachers, "opd.mixture.kind=routing", "opd.prompts.teacher_column=skill"]))
    assert [one.role for one in requested_models(config)] == ["student", "teacher math", "teacher code"]
    replace(config, [], folder=tmp_path, steps=2)
    assert set(pq.read_table(tmp_path / "prompts.parquet")["skill"].to_pylist()) == {"math", "code"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["data.train_batchsize=4"],
            "no key 'data.train_batchsize'; did you mean 'data.train_batch_size'?",
        ),
        (["opd.divergense=forward_kl"], "did you mean 'opd.objective.divergence'?"),
        (
            ["opd.temperature=2"],
            "did you mean 'opd.objective.student_temperature' or 'opd.objective.teacher_temperature'?",
        ),
        (["opd.model=/nfs/teacher"], "did you mean 'opd.teacher.model'?"),
        (["opd.teacher.attention=sdpa"], "did you mean 'opd.teacher.attn_implementation'?"),
        (["opd.zzz=1"], "a table of its keys"),
        (["opd.teachers.math.model=/nfs/math"], "write +opd.teachers.math.model=… if it is to be added"),
        (["+opd=defualt"], "opd"),
        (["data.train_batch_size=[4"], "verl's config"),
        (["data.train_batch_size=${no.such}"], "'no.such' not found"),
        (["data.train_batch_size=many"], "data.train_batch_size=many must be a whole number above 0"),
        ([f"{ROLLOUT}.name=???"], "rollout.name is not set"),
        (["model_engine=megatron"], "with this model_engine; it is there with FSDP"),
        (["trainer.n_gpus_per_node=7"], "28 data-parallel workers cannot share equally"),
        ([f"{ACTOR}.ppo_micro_batch_size_per_gpu=7"], "does not divide the 64 samples"),
    ],
)
def test_a_config_that_cannot_work_is_refused(more: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        checked(*more)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_advised_for_an_unknown_key_is_taken():
    teacher = "+opd.teachers.math.model=/nfs/math"
    words = [word for word in CLUSTER if "opd.teacher." not in word]
    advised = [
        "opd.objective.student_temperature=2",
        "opd.objective.teacher_temperature=2",
        "opd.teacher.attn_implementation=sdpa",
        teacher,
    ]
    section = OmegaConf.to_container(compose(read_words([*words, *advised])).opd, resolve=True)
    settings, _ = parse(section)
    assert settings.teachers["math"].model == "/nfs/math"
    assert settings.objective.student_temperature == settings.objective.teacher_temperature == 2.0


def test_an_engine_that_no_cpu_runs_is_refused():
    config = compose(read_words(["model_engine=megatron", f"{ROLLOUT}.name=vllm"]))
    with pytest.raises(ConfigError, match="model_engine=megatron with strategy=megatron is no FSDP"):
        check_given(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train_batch_size"], "'data.train_batch_size' is not an override"),
        (["--multirun"], "'--multirun' is no option here"),
        (["--config-name"], "--config-name is without a value"),
    ],
)
def test_a_word_that_is_no_override_is_refused(words: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        read_words(words)


def test_the_section_opd_has_to_be_added():
    with pytest.raises(ConfigError, match=r"add \+opd=default"):
        compose(read_words(["opd.objective.divergence=forward_kl"]))


def test_a_config_of_the_users_own_is_found(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {train_batch_size: 48}\n")
    words = read_words(["--config-dir", str(tmp_path), "--config-name=mine", "data.seed=1"])
    assert compose(words).data.train_batch_size == 48
    assert words.flags() == ["--config-name=mine", f"--config-dir={tmp_path}"]


@pytest.mark.parametrize("value", [None, True, 3, 1e-6, "it's [a] path=1, {b}", ["a b", 2], {"x": "fp32"}])
def test_a_value_survives_the_command_line(value: object):
    assert compose(read_words([]), [f"++data.seed={literal(value)}"]).data.seed == value


def test_data_too_small_for_a_batch_is_told(tmp_path: Path):
    data = make_prompts(tmp_path / "own.parquet", rows=10)
    with pytest.raises(DataError, match=r"hold 10 prompts, fewer than data\.train_batch_size=1024"):
        replaced(tmp_path, f"data.train_files={data}")


def test_a_column_that_is_not_there_is_told(tmp_path: Path):
    data = make_prompts(tmp_path / "own.parquet", rows=10)
    with pytest.raises(DataError, match=r"no column 'question' \(data\.prompt_key\), it has data_source, prompt"):
        replaced(tmp_path, f"data.train_files={data}", "data.prompt_key=question")


def asked(*paths: Path | str) -> list[RequestedModel]:
    return [RequestedModel(role=f"model {i}", key=f"key{i}", path=str(path)) for i, path in enumerate(paths)]


def config_folder(folder: Path, config) -> Path:
    """A model's folder without its weights: they are not needed."""
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


LARGE = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}


def test_a_stand_in_keeps_class_and_tokenizer_without_the_rows_that_pad_it(tmp_path: Path):
    own = config_folder(tmp_path / "own", Qwen3Config(vocab_size=1000, intermediate_size=9999, head_dim=128, **LARGE))
    (made,) = make_models(asked(own), tmp_path)
    assert made.readable
    config = AutoConfig.from_pretrained(made.folder)
    assert (config.model_type, config.vocab_size, config.hidden_size, config.head_dim) == ("qwen3", 258, 64, 16)
    assert (config.num_attention_heads, config.num_key_value_heads, len(config.layer_types)) == (4, 2, 2)
    assert AutoTokenizer.from_pretrained(made.folder).get_vocab() == byte_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(made.folder).num_parameters() < 500_000


def test_a_mixture_of_experts_stays_one(tmp_path: Path):
    own = Qwen3MoeConfig(vocab_size=300, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, **LARGE)
    small = shrink(own, 300)
    assert (small.num_experts, small.num_experts_per_tok, small.moe_intermediate_size) == (4, 2, 32)
    (made,) = make_models(asked(config_folder(tmp_path / "own", own)), tmp_path)
    assert AutoConfig.from_pretrained(made.folder).model_type == "qwen3_moe"


def test_a_model_of_one_layer_stays_one():
    small = shrink(Qwen3Config(vocab_size=1000, **{**LARGE, "num_hidden_layers": 1}), 300)
    assert (small.num_hidden_layers, len(small.layer_types)) == (1, 1)


def test_names_that_a_class_spells_its_own_way_are_shrunk_too():
    small = shrink(GPT2Config(n_embd=1600, n_layer=48, n_head=25), 300)
    assert (small.n_embd, small.n_layer, small.n_head) == (64, 2, 4)


def test_a_model_that_is_not_here_becomes_like_one_that_is(tmp_path: Path):
    own = config_folder(tmp_path / "own", Qwen3Config(vocab_size=1000, **LARGE))
    absent, present = make_models(asked("/nfs/absent", own), tmp_path)
    assert (absent.readable, present.readable) == (False, True)
    assert AutoConfig.from_pretrained(absent.folder).model_type == "qwen3"
    weights = [AutoModelForCausalLM.from_pretrained(one.folder).lm_head.weight for one in (absent, present)]
    assert not weights[0].equal(weights[1])


def test_models_that_are_not_here_become_llamas_that_read_bytes(tmp_path: Path):
    for made in make_models(asked("/nfs/student", "no-such-owner/teacher"), tmp_path):
        assert not made.readable
        assert AutoConfig.from_pretrained(made.folder).model_type == "llama"
        assert AutoTokenizer.from_pretrained(made.folder).chat_template is not None


LIBRARY = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_kind"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


AutoConfig.register("own_kind", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
"""


def imported(folder: Path, library: object) -> None:
    config = composed()
    OmegaConf.update(config, "actor_rollout_ref.model.external_lib", library)
    _Run(folder=folder, end=0.0, limit=0.0, say=print).import_library(config)


def test_a_stand_in_of_a_class_that_a_library_registers_is_of_that_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The library lies where the command is run, as `python -m verl.trainer.main_ppo` finds it."""
    (tmp_path / "own_kind_library.py").write_text(LIBRARY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    own = config_folder(tmp_path / "own", LlamaConfig(vocab_size=300, **LARGE))
    text = (own / "config.json").read_text(encoding="utf-8")
    (own / "config.json").write_text(
        text.replace('"model_type": "llama"', '"model_type": "own_kind"'), encoding="utf-8"
    )
    (before,) = make_models(asked(own), tmp_path / "before")
    assert not before.readable
    imported(tmp_path, ["own_kind_library", "opd.integrations.verl.dry_run.register"])
    (made,) = make_models(asked(own), tmp_path / "after")
    assert made.readable and AutoConfig.from_pretrained(made.folder).model_type == "own_kind"
    assert "own_kind, 2 layers of 64" in made.description


def test_a_library_that_is_not_here_is_told_before_anything_runs(tmp_path: Path):
    imported(tmp_path, None)
    with pytest.raises(OpdError, match=r"external_lib=not_here cannot be imported: ModuleNotFoundError"):
        imported(tmp_path, "not_here")


def test_trying_another_verl_is_an_option_of_the_dry_run_and_a_key_of_the_config():
    options, words = _split(["--try", "--steps", "1", "+opd=default"])
    assert (options, words) == ({"try_verl": True, "steps": 1}, ["+opd=default"])
    assert compose(read_words([*CLUSTER, "++opd.try_verl=true"])).opd.try_verl is True
