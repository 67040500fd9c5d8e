"""Models whose layers carry a state along the tokens: packed sequences do not see each other, on either side of the loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import plainly, two_ranks
from verl_engines import batch, engine, policy_loss, same, step

from mixing_models import APART, MIXING, tiny
from opd.losses import Objective
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model

TEACHERS = ("qwen3_next", "qwen3_5_text", "lfm2", "falcon_h1", "jamba")


@pytest.fixture(scope="module")
def zoo(models: Path) -> Path:
    """The models of the other tests, and one of each kind."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for seed, kind in enumerate((*MIXING, *APART)):
        model = tiny(kind, len(tokenizer), seed=seed, initializer_range=0.2)
        save_model(model, tokenizer, models / kind)
    return models


def built(zoo: Path, *, teacher: str, **settings):
    return engine(zoo, teacher={"model": str(zoo / teacher)}, **settings)


@pytest.mark.parametrize("size", [4, 2], ids=["one micro-batch", "two"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_with_a_state_reads_each_packed_sequence_alone(zoo: Path, kind: str, size: int):
    loss, gradients, _ = step(built(zoo, teacher=kind), batch(micro_batch_size=size))
    expected, plain_gradients = plainly(zoo, batch(), Objective(), teacher=kind)
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, plain_gradients)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_a_student_with_a_state_reads_each_packed_sequence_alone(
    zoo: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    """Its log-probs outside training too, or ratios would not start at 1. The reference policy is verl's, and the log says what to set."""
    student = built(zoo, student=kind, teacher="teacher")
    assert "Set actor_rollout_ref.model.use_remove_padding=False if verl's reference" in capsys.readouterr().out
    advised = built(zoo, student=kind, teacher="teacher", remove_padding=False)
    assert not advised.reads_rows and "row of its own" not in capsys.readouterr().out
    loss, gradients, _ = step(student, batch())
    expected, plain_gradients = plainly(zoo, batch(), Objective(), student=kind)
    assert loss == pytest.approx(expected, rel=1e-5)
    same(gradients, plain_gradients)
    with student.eval_mode(), torch.no_grad():
        packed = student.infer_batch(batch(), None)["model_output"]["log_probs"]
        padded = student.infer_batch(batch(remove_padding=False), None)["model_output"]["log_probs"]
    torch.testing.assert_close(packed.values(), padded.values(), rtol=0, atol=1e-6)


def test_models_without_a_state_stay_packed(zoo: Path):
    for kind in ("teacher", "gemma3_text", "qwen3_moe"):
        student = built(zoo, teacher=kind)
        (teacher,) = student.teachers.members
        assert not student.reads_rows and not teacher.reads_rows, kind


def test_the_students_base_reads_as_the_student_does(zoo: Path):
    student = engine(zoo, student="lfm2", lora_rank=4, teacher={"source": "adapter_off"})
    loss, _, metrics = step(student, batch(micro_batch_size=2))
    assert loss == 0.0 == metrics["actor/opd/reverse_kl"]


def test_of_several_teachers_each_reads_in_its_own_way(zoo: Path):
    def run(**data: bool) -> tuple[float, dict[str, torch.Tensor]]:
        named = {name: {"model": str(zoo / name)} for name in ("lfm2", "teacher")}
        loss, gradients, _ = step(engine(zoo, teacher=None, teachers=named, mixture_kind="loss", **data), batch(**data))
        return loss, gradients

    packed, gradients = run()
    padded, plain_gradients = run(remove_padding=False)
    assert packed == pytest.approx(padded, rel=1e-5)
    same(gradients, plain_gradients)


@pytest.mark.slow
def test_two_ranks_with_such_a_teacher_make_the_step_of_one(zoo: Path, tmp_path: Path):
    """Both shard it, and ask it together whether it mixes."""
    settings = {"rl_weight": 0.5, "teacher": {"model": str(zoo / "lfm2")}}
    out = two_ranks(zoo, tmp_path / "out.pt", "data", **settings)
    loss, gradients, _ = step(engine(zoo, **settings), batch(entropy=True), policy_loss(entropy_coeff=0.1))
    assert out["loss"] == pytest.approx(loss, rel=1e-6)
    same(out["gradients"], gradients)


@pytest.mark.slow
def test_where_ranks_share_a_sequence_a_state_is_refused(zoo: Path, tmp_path: Path):
    """A rank has no state of the slices before its own, so that rows would not help."""
    script = Path(__file__).with_name("verl_two_ranks.py")
    settings = json.dumps({"teacher": {"model": str(zoo / "lfm2")}})
    command = [sys.executable, script, zoo, tmp_path / "out.pt", "sequence", settings]
    shared = {**os.environ, "WORLD_SIZE": "2", "DIST_INIT_METHOD": f"file://{tmp_path}/store"}
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for text in said:
        assert "ConfigError: the teacher (lfm2) lets packed sequences see each other" in text, text
        assert "ulysses_sequence_parallel_size=1" in text
