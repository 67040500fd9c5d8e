"""What verl's main checks on the driver, in this process: a run that works is taken, and what cannot work is refused there by its name."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    GraniteMoeConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl_world import make_models

from opd.errors import ConfigError, ModelError
from opd.integrations.verl.contract import source_check
from opd.integrations.verl.contract.source_check import ReliedOn
from opd.integrations.verl.dry_run.compose import compose, read_words
from opd.integrations.verl.plugin import driver
from opd.integrations.verl.plugin import hydra_targets as targets
from opd.testing import CHAT_TEMPLATE, byte_tokenizer

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{name}" for name in ("actor", "model", "rollout"))
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of which the driver reads configs and tokenizers alone; `bare` has its tokenizer in the folder `words`."""
    place = make_models(tmp_path_factory.mktemp("models"))
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for name, config in {
        "capped": Gemma2Config(vocab_size=258, head_dim=8, architectures=["Gemma2ForCausalLM"], **SMALL),
        "uncapped": Gemma2Config(
            vocab_size=258, head_dim=8, final_logit_softcapping=None, architectures=["Gemma2ForCausalLM"], **SMALL
        ),
        "granite": GraniteConfig(vocab_size=258, logits_scaling=8.0, architectures=["GraniteForCausalLM"], **SMALL),
        "cohere": CohereConfig(vocab_size=258, logit_scale=0.0625, architectures=["CohereForCausalLM"], **SMALL),
        "bare": LlamaConfig(vocab_size=258, architectures=["LlamaForCausalLM"], **SMALL),
    }.items():
        config.save_pretrained(place / name)
        if name != "bare":
            tokenizer.save_pretrained(place / name)
    tokenizer.save_pretrained(place / "words")
    return place


@functools.cache
def composed(*words: str) -> DictConfig:
    """verl's config, made once: composing takes a second."""
    own = [
        "algorithm.adv_estimator=grpo",
        "data.train_batch_size=8",
        f"{ROLLOUT}.name=transformers",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=1",
        f"{ACTOR}.ppo_mini_batch_size=8",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=1",
    ]
    return compose(read_words([*words, *own]))


def validate(
    folder: Path,
    settings: Mapping[str, object] | None = None,
    *,
    student: str = "student",
    teacher: str = "teacher",
    group: str = "default",
) -> None:
    """As `main_ppo` with `+opd=GROUP` and these settings does before it starts Ray."""
    config = copy.deepcopy(composed(f"+opd={group}"))
    models = {f"{MODEL}.path": f"{folder}/{student}", "opd.teacher.model": f"{folder}/{teacher}"}
    for key, value in {**models, **(settings or {})}.items():
        OmegaConf.update(config, key, value, force_add=True)
    validate_config(config, need_reference_policy(config), need_critic(config))


@pytest.fixture(autouse=True)
def no_look_at_hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_hooks is about them; reading verl's source for every case here would take half of the time."""
    if "told" not in request.node.name:
        monkeypatch.setattr(targets, "check_contract", lambda *_, **__: "")


def test_a_run_that_works_is_taken_and_told(folder: Path, capsys: pytest.CaptureFixture[str]):
    validate(folder)
    out = capsys.readouterr().out
    assert f"reverse_kl rl.distill_weight=1 rl.weight=0, teacher '{folder}/teacher' in the actor" in out
    assert "none of the releases" not in out and "warning" not in out


def test_a_verl_of_another_number_is_taken_and_one_that_moved_a_hook_only_when_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(source_check, "version_of", lambda _: "0.10.0.dev")
    validate(folder)
    assert "verl 0.10.0.dev is none of the releases that opd was tested with" in capsys.readouterr().out
    moved = ReliedOn(where="verl.workers.utils.padding:no_padding_2_padding", needs="tensor data gone", why="a test")
    monkeypatch.setitem(source_check.BY_PART, "engine", (moved,))
    with pytest.raises(ConfigError, match=r"no_padding_2_padding has no gone .* set opd\.try_verl=true"):
        validate(folder)
    validate(folder, {"opd.try_verl": True})
    assert "opd: warning: verl 0.10.0.dev differs at 1 of" in capsys.readouterr().out


def test_a_tokenizer_in_a_folder_of_its_own_is_read(folder: Path):
    validate(folder, {f"{MODEL}.tokenizer_path": f"{folder}/words"}, student="bare")
    with pytest.raises(ModelError, match=rf"{MODEL}\.path='{folder}/bare' cannot be read"):
        validate(folder, student="bare")


def test_a_config_in_a_folder_of_its_own_is_read(folder: Path, tmp_path: Path):
    byte_tokenizer().save_pretrained(tmp_path)
    validate(folder, {f"{MODEL}.hf_config_path": f"{folder}/bare", f"{MODEL}.path": str(tmp_path)})
    with pytest.raises(ModelError, match=r"with hf_config_path='/nowhere' cannot be read"):
        validate(folder, {f"{MODEL}.hf_config_path": "/nowhere"})


LIBRARY = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class {name}Config(LlamaConfig):
    model_type = "{name}"


class {name}ForCausalLM(LlamaForCausalLM):
    config_class = {name}Config


AutoConfig.register("{name}", {name}Config)
AutoModelForCausalLM.register({name}Config, {name}ForCausalLM)
"""


def own_architecture(folder: Path, name: str) -> Path:
    """A model whose class only `name`_library knows, which is beside it."""
    (folder / f"{name}_library.py").write_text(LIBRARY.format(name=name), encoding="utf-8")
    model = folder / name
    config = LlamaConfig(vocab_size=258, architectures=[f"{name}ForCausalLM"], **SMALL)
    config.save_pretrained(model)
    text = (model / "config.json").read_text(encoding="utf-8")
    (model / "config.json").write_text(
        text.replace('"model_type": "llama"', f'"model_type": "{name}"'), encoding="utf-8"
    )
    byte_tokenizer().save_pretrained(model)
    return model


def test_an_architecture_of_an_external_library_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The student's, and a teacher of the same class."""
    monkeypatch.syspath_prepend(str(tmp_path))
    own = str(own_architecture(tmp_path, "homemade"))
    with pytest.raises(ModelError, match="cannot be read"):
        validate(folder, {f"{MODEL}.path": own})
    library = {f"{MODEL}.external_lib": "homemade_library"}
    validate(folder, {**library, f"{MODEL}.path": own, "opd.teacher.model": own})
    assert "homemade_library" in sys.modules


def test_a_library_that_is_not_on_the_driver_is_told_and_ends_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Only workers may have it: the run is refused where the model cannot be read without it."""
    library = {f"{MODEL}.external_lib": "no_such_library"}
    validate(folder, library)
    assert (
        "opd: warning: actor_rollout_ref.model.external_lib=no_such_library cannot be imported here"
        in capsys.readouterr().out
    )
    with pytest.raises(ModelError, match="no_such_library cannot be imported here"):
        validate(folder, {**library, f"{MODEL}.path": "/nowhere"})


@pytest.mark.parametrize("name", ["capped", "granite", "cohere"])
def test_a_model_that_changes_its_logits_is_refused(folder: Path, name: str):
    for more in ({"student": name}, {"teacher": name}):
        with pytest.raises(ModelError) as caught:
            validate(folder, **more)
        role, key = ("student", f"{MODEL}.path") if "student" in more else ("teacher", "opd.teacher.model")
        assert f"{role} {key}='{folder}/{name}' changes its logits after the output layer" in str(caught.value)


def test_a_cap_that_is_switched_off_is_none(folder: Path):
    validate(folder, student="uncapped", teacher="uncapped")
    validate(folder, {f"{MODEL}.override_config.final_logit_softcapping": None}, student="capped")


def test_a_teacher_in_a_server_may_do_with_its_logits_what_it_likes(folder: Path):
    validate(folder, {"opd.objective.top_k": 8}, teacher="capped", group="pool")
    with pytest.raises(ModelError, match="teacher opd"):
        validate(folder, teacher="capped", group="hidden")


def test_the_students_base_needs_an_adapter(folder: Path):
    own = {"opd.teacher.source": "adapter_off", "opd.teacher.model": None}
    with pytest.raises(ConfigError, match=r"the student has no LoRA adapter; set actor_rollout_ref.model.lora_rank"):
        validate(folder, own)
    validate(folder, {**own, f"{MODEL}.lora_rank": 4})


@pytest.mark.parametrize(
    ("group", "support"), [("default", "teacher_top_k"), ("default", "union"), ("pool", "teacher_top_k")]
)
def test_a_support_larger_than_the_vocabulary_is_refused(folder: Path, group: str, support: str):
    with pytest.raises(ConfigError, match=r"opd\.objective\.top_k=259 is more than the 258 tokens"):
        validate(folder, {"opd.objective.support": support, "opd.objective.top_k": 259}, group=group)
    validate(folder, {"opd.objective.support": support, "opd.objective.top_k": 258}, group=group)


def engine_checked(word: str) -> None:
    config = composed("+opd=default", "opd.teacher.model=teacher", word)
    validate_config(config, need_reference_policy(config), need_critic(config))


@pytest.mark.parametrize("engine", ["megatron", "veomni", "torchtitan"])
def test_an_engine_without_fsdp_is_refused_by_its_name(engine: str):
    said = rf"model_engine={engine}: opd takes hidden states inside FSDP's forward pass.*set model_engine=dp"
    with pytest.raises(ConfigError, match=said):
        engine_checked(f"model_engine={engine}")


def test_a_config_file_of_another_engine_is_refused_by_the_engines_name():
    with pytest.raises(ConfigError, match="model_engine=megatron: opd takes"):
        engine_checked("--config-name=ppo_megatron_trainer")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_teacher_that_would_see_parts_of_sequences_is_refused(folder: Path, attention: str):
    shared = {f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 2, "trainer.n_gpus_per_node": 2}
    with pytest.raises(ConfigError, match=f"the teacher has {attention}, which would see one part"):
        validate(folder, {**shared, "opd.teacher.attn_implementation": attention})
    validate(folder, shared)


def test_a_class_that_cannot_be_made_small_is_left_to_the_first_step(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError):
        driver.refuse_changed_logits(Gemma2Config(), "student")
    monkeypatch.setattr(driver, "shrink", lambda *_: int("no number"))
    driver.refuse_changed_logits(Gemma2Config(), "student")


@pytest.mark.parametrize(
    "config",
    [
        RecurrentGemmaConfig(),
        FalconH1Config(lm_head_multiplier=0.5),
        Cohere2Config(),
        GraniteMoeConfig(logits_scaling=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_classes_that_nobody_listed_are_found_by_running_them(config):
    with pytest.raises(ModelError, match="changes its logits after the output layer"):
        driver.refuse_changed_logits(config, "student")


@pytest.mark.parametrize(
    "config",
    [
        FalconH1Config(lm_head_multiplier=1.0), DeepseekV3Config(), PhiConfig(), GPT2Config(), Qwen3NextConfig(), Gemma3TextConfig(),
        GraniteMoeConfig(logits_scaling=1.0), MixtralConfig(), Lfm2Config(),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_classes_whose_logits_are_a_product_are_taken(config):
    """Biased, tied, recurrent, convolutional, of experts."""
    driver.refuse_changed_logits(config, "student")
