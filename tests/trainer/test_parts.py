"""A checkpoint of divided weights: every rank writes its own parts, one process reads them all, and damage is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parts_ranks import AVERAGED, WORLD
from rank_cases import recipe
from rank_checks import run_program

from opd.errors import RunFolderError
from opd.trainer.checkpoint import load_checkpoint, load_trained_weights
from opd.trainer.from_config import RunComponents
from opd.trainer.student import Student

PROGRAM = Path(__file__).with_name("parts_ranks.py")


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("school")
    run_program(PROGRAM, folder)
    return folder


@pytest.fixture
def seen(school) -> dict[str, Any]:
    return torch.load(school / "seen.pt", weights_only=True)


@pytest.fixture
def checkpoint(school, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(school / "run" / "checkpoints" / "step-00000002", tmp_path / "step-00000002"))


def student_of(folder: Path, **more: object) -> Student:
    return RunComponents(recipe(folder, {**AVERAGED, **more})).student


def files(checkpoint: Path) -> list[Path]:
    return sorted((checkpoint / "parts").iterdir())


@pytest.mark.slow
def test_every_rank_writes_a_file_about_as_large_as_the_others(checkpoint):
    sizes = [path.stat().st_size for path in files(checkpoint)]
    assert len(sizes) == WORLD and max(sizes) < 1.2 * min(sizes)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["parts", "state.json"]


@pytest.mark.slow
def test_one_process_reads_weights_averages_and_moments_bit_for_bit(school, checkpoint, seen):
    student = student_of(school)
    load_checkpoint(checkpoint, student)
    found, expected = student.by_name(), seen["everything"]
    assert found.keys() == expected.keys()
    assert {name.partition("/")[0] for name in found} == {"weights", "ema", "optimizer"}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert any(float(tensor.abs().max()) > 0 for name, tensor in found.items() if name.endswith("exp_avg"))
    other = student_of(school)
    load_trained_weights(checkpoint, other.model, other)
    assert all(torch.equal(p, expected[f"weights/{name}"]) for name, p in other.trained().items())


@pytest.mark.slow
@pytest.mark.parametrize("which", range(WORLD))
def test_a_file_that_is_missing_or_cut_is_told_and_nothing_is_read_as_zeros(school, checkpoint, which):
    student = student_of(school)
    before = {name: p.detach().clone() for name, p in student.trained().items()}
    path = files(checkpoint)[which]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunFolderError, match=r"cannot be read.*Delete that folder to resume from the one before it"):
        load_checkpoint(checkpoint, student)
    path.unlink()
    for load in (lambda: load_checkpoint(checkpoint, student), lambda: load_trained_weights(checkpoint, student.model)):
        with pytest.raises(RunFolderError, match=r"'parts'"):
            load()
    assert all(torch.equal(before[name], p) for name, p in student.trained().items())


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(school, checkpoint):
    with pytest.raises(RunFolderError, match="is of another model"):
        load_checkpoint(checkpoint, student_of(school, student__lora__rank=4))
    with pytest.raises(RunFolderError, match="is of another model"):
        load_checkpoint(checkpoint, student_of(school, student__model=str(school / "odd")))


@pytest.mark.slow
def test_one_rank_without_room_leaves_the_earlier_checkpoint_and_rank_0_says_so(school):
    told = json.loads((school / "seen.json").read_text())
    assert "cannot be written" in told["said"] and "No space left for rank 1" in told["said"]
    assert told["there"] == ["step-00000002"]
