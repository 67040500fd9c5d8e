"""A teacher whose server sends hidden states: the engine on them, against the same teacher in the actor's workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.replica import get_rollout_replica_class
from verl_engines import batch, engine, jagged, same, step
from verl_world import section

from opd.errors import ConfigError, ModelError, NonFiniteError
from opd.integrations.verl.plugin.checks import RunFacts, TeacherServers, check_run
from opd.integrations.verl.plugin.settings import parse
from opd.integrations.verl.plugin.teachers.hidden_server import load_teacher, read_states, trusts
from opd.integrations.verl.plugin.teachers.served import load_head

HIDDEN = {"placement": "hidden"}


def served(models: Path, *, teacher: str = "teacher", dtype: torch.dtype = torch.float32, **made):
    """The batch as verl's agent loop leaves it, with what our server answers about every sequence."""
    model = AutoModelForCausalLM.from_pretrained(models / teacher, dtype=dtype).eval()
    data = batch(**made)
    sequences = [ids.tolist() for ids in data["input_ids"].unbind()]
    data["teacher_logprobs"] = jagged([read_states(model, ids) for ids in sequences])
    data["teacher_ids"] = jagged([torch.tensor([*ids[1:], 0], dtype=torch.int32).unsqueeze(-1) for ids in sequences])
    return data


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "forward_kl", "student_temperature": 2.0, "teacher_temperature": 2.0},
        {"divergence": "generalized_jsd", "beta": 0.3, "support": "union", "top_k": 8},
        {"support": "sampled", "estimator": "k1", "delivery": "advantage"},
    ],
    ids=lambda s: "-".join(map(str, s.values())) or "reverse_kl",
)
@pytest.mark.parametrize("teacher", ["teacher", "tied", "wide"])
def test_the_loss_and_every_gradient_are_those_of_a_teacher_in_the_worker(models: Path, settings: dict, teacher: str):
    path = {"teacher": {"model": str(models / teacher)}}
    loss, gradients, metrics = step(engine(models, **HIDDEN, **path, **settings), served(models, teacher=teacher))
    expected, others, their_metrics = step(engine(models, **path, **settings), batch())
    assert loss == pytest.approx(expected, rel=1e-6)
    same(gradients, others)
    assert metrics == pytest.approx(their_metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("made", [{"remove_padding": False}, {"micro_batch_size": 1, "hide": ((1, 0), (2, 3))}])
def test_padding_and_micro_batches_make_no_difference(models: Path, made: dict):
    whole = {key: value for key, value in made.items() if key == "hide"}
    expected, _, _ = step(engine(models, **HIDDEN), served(models, **whole))
    packed = made.get("remove_padding", True)
    loss, _, _ = step(engine(models, remove_padding=packed, **HIDDEN), served(models, **made))
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("offload", [True, False])
def test_bfloat16_states_are_off_by_rounding_only(models: Path, offload: bool):
    exact, _, _ = step(engine(models, **HIDDEN), served(models))
    built = engine(models, **HIDDEN, teacher={"model": str(models / "teacher"), "offload": offload})
    rounded, _, _ = step(built, served(models, dtype=torch.bfloat16))
    assert rounded == pytest.approx(exact, rel=0.03)
    assert rounded != exact


def test_the_head_is_found_in_shards_and_in_tied_embeddings(models: Path, tmp_path: Path):
    whole = load_file(models / "teacher" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(models / "teacher").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(load_head(str(tmp_path)).weight, whole["lm_head.weight"])
    tied = load_file(models / "tied" / "model.safetensors")
    assert torch.equal(load_head(str(models / "tied")).weight, tied["model.embed_tokens.weight"])


def test_a_head_that_is_not_there_is_refused(models: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((models / "teacher" / "config.json").read_text())
    save_file({"something": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"hold no lm_head\.weight"):
        load_head(str(tmp_path))


def test_states_of_another_width_are_refused(models: Path):
    data = served(models)
    data["teacher_logprobs"] = jagged([row[:, :-1] for row in data["teacher_logprobs"].unbind()])
    with pytest.raises(ModelError, match="its output layer takes"):
        step(engine(models, **HIDDEN), data)


def test_states_that_are_nan_stop_before_an_update(models: Path):
    data = served(models)
    data["teacher_logprobs"].values()[6] = torch.nan
    with pytest.raises(NonFiniteError, match="no update was made"):
        step(engine(models, **HIDDEN), data)


def test_the_config_group_asks_our_server_for_one_row_per_token():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["+opd=hidden", "opd.teacher.model=/teacher"])
    made = omega_conf_to_dataclass(config.distillation)
    assert made.distillation_loss.loss_settings.use_topk is False
    (teacher,) = made.teacher_models.values()
    assert (teacher.model_path, teacher.inference.name) == ("/teacher", "opd_hidden")
    assert get_rollout_replica_class("opd_hidden").__module__ == "opd.integrations.verl.plugin.teachers.hidden_server"


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ({"engine": "vllm"}, "inference.name=vllm sends no hidden states"),
        ({"tensor_parallel": 2}, "tensor_model_parallel_size=2"),
        ({"model_path": "other"}, "opd.teacher.model=teacher"),
    ],
)
def test_a_server_that_sends_no_states_is_refused(pool: dict, said: str):
    settings, _ = parse(section(teacher={"model": "teacher", "offload": True}, **HIDDEN))
    good = {"engine": "opd_hidden", "model_path": "teacher"}
    run = {"strategy": "fsdp2", "native_distillation": True}
    check_run(settings, RunFacts(**run, pool=TeacherServers(**good)))
    with pytest.raises(ConfigError) as caught:
        check_run(settings, RunFacts(**run, pool=TeacherServers(**{**good, **pool})))
    assert said in str(caught.value)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_a_server_runs_the_teachers_own_code_where_the_config_allows_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = tmp_path / "own"
    shutil.copytree(models / "teacher", own)
    (own / "mine.py").write_text(OWN_CODE, encoding="utf-8")
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for allowed in (True, False):
        with initialize_config_module("verl.trainer.config", version_base=None):
            made = compose(
                "ppo_trainer",
                [
                    "+opd=hidden",
                    f"opd.teacher.model={own}",
                    f"opd.teacher.trust_remote_code={allowed}",
                    "actor_rollout_ref.rollout.name=vllm",
                ],
            )
        inference = made.distillation.teacher_models.teacher_model.inference
        assert trusts(omega_conf_to_dataclass(inference).engine_kwargs) is allowed
    model = load_teacher(str(own), "float32", "cpu", trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"
    plain = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float32).eval()
    assert torch.equal(read_states(model, [1, 2, 3]), read_states(plain, [1, 2, 3]))
