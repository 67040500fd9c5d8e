"""teacher.cache with a teacher behind a server: kept scores are those of the model that serves now, whatever its address says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.config.recipe import build, merge
from opd.errors import CacheError
from opd.reporting.record import read_metrics
from opd.teachers.identities import SAME, Identities
from opd.testing import digit_tokenizer
from opd.trainer.run import train
from remote.scripted import serving
from teachers.model_server import ModelServer
from worlds import settings

pytestmark = pytest.mark.timeout(200)
TOKENIZER = digit_tokenizer()
PROBED = 2 * 3  # rows of the fixed text, at two temperatures


class Counting(ModelServer):
    def __init__(self, model: Any) -> None:
        super().__init__(model, TOKENIZER)
        self.rows = 0

    def __call__(self, asked: Any) -> Any:
        self.rows += len(asked.body["prompt"]) if asked.path == "/v1/completions" else 0
        return super().__call__(asked)


def run(world: Path, run_dir: Path, model: Any, cache: Path | None) -> tuple[list[float], int]:
    """Losses of a run, and the rows that the server was asked for."""
    values = settings(world, run_dir, train__steps=3, eval__every=0, log__progress="off")
    del values["teacher.model"]
    counting = Counting(model)
    with serving(counting) as (server,):
        values |= {"teacher.url": server.url, "teacher.canary_every": 0, "teacher.cache": cache and str(cache)}
        values |= {"objective.support": "teacher_top_k", "objective.top_k": 4, "objective.tail": "sampled"}
        train(build(merge({}, values)))
    return [record.metrics["loss"] for record in read_metrics(run_dir) if "loss" in record.metrics], counting.rows


def teacher(world: Path, noise: float = 0.0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


def test_a_repeated_run_asks_for_the_fixed_text_alone_and_is_the_same(world: Path, tmp_path: Path):
    plain, asked = run(world, tmp_path / "plain", teacher(world), None)
    first, filled = run(world, tmp_path / "first", teacher(world), tmp_path / "kept")
    second, then = run(world, tmp_path / "second", teacher(world), tmp_path / "kept")
    assert asked == filled == PROBED + 3 * 6 * 2 and then == PROBED
    assert first == plain and second == plain


def test_a_model_that_was_trained_on_under_the_same_name_is_asked_itself(world: Path, tmp_path: Path):
    run(world, tmp_path / "old", teacher(world), tmp_path / "kept")
    moved = teacher(world, noise=0.02)
    plain, asked = run(world, tmp_path / "plain", moved, None)
    cached, also = run(world, tmp_path / "cached", moved, tmp_path / "kept")
    assert cached == plain and also == asked


def test_a_name_outlives_rounding_and_no_more(tmp_path: Path):
    names = Identities(tmp_path)
    name = names.name_of("vllm a", "-1.0000 -2.0000")
    assert Identities(tmp_path).name_of("vllm a", "-1.0001 -2.0000") == name
    others = [("vllm b", "-1.0000 -2.0000"), ("vllm a", "-1.0000"), ("vllm a", f"{-1 - 4 * SAME:.4f} -2.0000")]
    assert len({name, *(names.name_of(*one) for one in others)}) == 4


def test_a_damaged_list_of_names_says_what_to_delete(world: Path, tmp_path: Path):
    plain, _ = run(world, tmp_path / "first", teacher(world), tmp_path / "kept")
    (tmp_path / "kept" / "served.json").write_text('[{"name": ')
    with pytest.raises(CacheError, match=r"served\.json' is damaged.*Delete it"):
        run(world, tmp_path / "second", teacher(world), tmp_path / "kept")
    (tmp_path / "kept" / "served.json").unlink()
    assert run(world, tmp_path / "third", teacher(world), tmp_path / "kept")[0] == plain


def test_a_folder_that_cannot_be_written_to_costs_a_name_its_memory_and_no_run(tmp_path: Path):
    (tmp_path / "file").write_text("")
    names = Identities(tmp_path / "file" / "kept")
    assert (
        names.name_of("vllm a", "-1.0000") == names.name_of("vllm a", "-1.0000") != names.name_of("vllm a", "-2.0000")
    )
