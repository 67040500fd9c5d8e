"""Where the frozen teacher's shards are while nobody asks it, and which attention it runs: settings of the actor reach it as they should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from verl_engines import batch, engine, join, same, step

from opd.errors import ConfigError
from opd.integrations.verl.plugin.model_checks import teacher_attention
from opd.integrations.verl.plugin.settings import TeacherSettings
from opd.integrations.verl.plugin.teachers import in_actor as frozen_model


def gathered(module: torch.nn.Module) -> list[str]:
    """The layers whose weights FSDP2 holds whole."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, FSDPModule) and not layer._get_fsdp_state()._fsdp_param_group.is_sharded
    ]


@pytest.mark.parametrize("student", ["student", "tied"])
@pytest.mark.parametrize("reshard", [True, False])
def test_a_teacher_is_sharded_again_after_a_step(models: Path, student: str, reshard: bool):
    """It has no backward pass, which is what would shard it when the actor keeps its layers for one."""
    path = str(models / ("teacher" if student == "student" else "tied"))
    built = engine(models, reshard_after_forward=reshard, student=student, teacher={"model": path})
    step(built, batch(micro_batch_size=2))
    (member,) = built.teachers.members
    assert gathered(member.module) == []
    assert sum(isinstance(layer, FSDPModule) for layer in member.module.modules()) > 2


class Moves:
    """verl's functions that move a model, which on a CPU have nowhere to move it, and what they were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}
        for function, word in (("offload_fsdp_model_to_cpu", "away"), ("load_fsdp_model_to_gpu", "back")):
            monkeypatch.setattr(frozen_model, function, lambda module, word=word: self.see(word, module))

    def see(self, word: str, module: torch.nn.Module) -> None:
        self.seen.append((word, self.names.get(id(module), "?")))


def test_a_teacher_leaves_the_device_with_the_students_weights(models: Path, monkeypatch: pytest.MonkeyPatch):
    """With param_offload: away once it is made, back when it is asked, away when the student's weights go; once each."""
    loss, gradients, _ = step(engine(models), batch())
    moves = Moves(monkeypatch)
    built = engine(models, param_offload=True)
    assert [word for word, _ in moves.seen] == ["away"]
    moves.names[id(built.teachers.members[0].module)] = "teacher"
    same_loss, same_gradients, _ = step(built, batch(micro_batch_size=2))
    assert same_loss == pytest.approx(loss, rel=1e-6)
    same(same_gradients, gradients)
    assert moves.seen[1:] == [("back", "teacher"), ("away", "teacher")]
    with built.eval_mode(), torch.no_grad():
        built.infer_batch(batch(), None)  # log-probs of the student: the teacher stays where it is
    built.to("cpu", model=True, optimizer=False, grad=False)  # as after sending weights
    assert moves.seen[3:] == []


@pytest.mark.parametrize("settings", [{}, {"param_offload": True, "offload_policy": True}], ids=["no", "policy"])
def test_a_teacher_moves_only_where_the_actor_says_so(models: Path, monkeypatch: pytest.MonkeyPatch, settings: dict):
    moves = Moves(monkeypatch)
    built = engine(models, **settings)
    step(built, batch())
    assert moves.seen == []
    (member,) = built.teachers.members
    assert member.engine_config.offload_policy == settings.get("offload_policy", False)


def test_the_students_base_moves_with_the_student_alone(models: Path, monkeypatch: pytest.MonkeyPatch):
    moves = Moves(monkeypatch)
    built = engine(models, param_offload=True, lora_rank=4, teacher={"source": "adapter_off"})
    step(built, batch())
    assert moves.seen == []


def attention(asked: str | None = None, dtype: str = "auto", student: str | None = None, **more: object) -> str | None:
    one = TeacherSettings(model="t", dtype=dtype, attn_implementation=asked)  # pyright: ignore[reportArgumentType]
    precision = frozen_model.PRECISIONS.get(dtype, "bf16")
    return teacher_attention(one, student=student, **{"precision": precision, "sequence_parallel": 1, **more})


def test_a_float32_teacher_beside_flash_attention_uses_sdpa():
    assert attention(dtype="float32") == "sdpa"  # verl's default is flash_attention_2
    assert attention(dtype="float32", student="flash_attention_3") == "sdpa"
    assert attention(precision="fp32") == attention(precision="float32") == "sdpa"
    assert attention(dtype="float32", student="eager") == "eager"
    assert attention() is None
    assert attention(student="flash_attention_3", dtype="float16") == "flash_attention_3"
    assert attention("sdpa", student="flash_attention_2") == "sdpa"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"asked": "flash_attention_2", "dtype": "float32"}, "takes bfloat16 and float16"),
        ({"dtype": "float32", "sequence_parallel": 2}, "opd.teacher.dtype=bfloat16"),
        ({"asked": "sdpa", "sequence_parallel": 2}, "attn_implementation=flash_attention_2"),
    ],
)
def test_attention_that_cannot_be_meant_is_refused(settings: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        attention(**settings)


def test_attention_over_shared_sequences_is_flash_or_ours():
    assert attention(sequence_parallel=2) is None
    assert attention(student="ulysses_sdpa", precision="fp32", sequence_parallel=2) == "ulysses_sdpa"


def test_a_float32_teacher_is_built_with_sdpa_where_the_student_has_flash_attention(models: Path):
    from verl.workers.config import FSDPEngineConfig, HFModelConfig

    join()
    student = HFModelConfig(path=str(models / "student"))  # verl's default attention
    one = TeacherSettings(model=str(models / "teacher"), dtype="float32")
    actor = SimpleNamespace(  # what a teacher reads of the actor's engine, which cannot be built with FlashAttention on a CPU
        model_config=student, engine_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False)
    )
    built = frozen_model.FrozenTeacher(one, actor)
    assert student.hf_config._attn_implementation == "flash_attention_2"
    assert built.module.config._attn_implementation == "sdpa"
