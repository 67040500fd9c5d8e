"""A run with divided weights goes on with any number of ranks and either way, and a rank that ends takes the others with it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_runs import BAD_STEP, MINUTE
from rank_checks import WEIGHT, run_program
from safetensors.torch import load_file

from opd.cli.main import main
from opd.config.ranks import check_ranks
from opd.config.recipe import build, merge
from opd.errors import ConfigError
from opd.reporting.record import read_metrics
from worlds import settings

PROGRAM = Path(__file__).with_name("fsdp2_runs.py")


@pytest.fixture(scope="module")
def results(world, tmp_path_factory) -> Path:
    """The folders of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    run_program(PROGRAM, world, folder)
    return folder


@pytest.fixture
def seen(results) -> dict[str, Any]:
    return json.loads((results / "seen.json").read_text())


def assert_same_student(run_dir: Path, reference: Path) -> None:
    """Files, config and weights of both students."""
    own, theirs = run_dir / "student", reference / "student"
    assert {p.name for p in own.iterdir()} == {p.name for p in theirs.iterdir()}
    assert json.loads((own / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    weights, others = load_file(own / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=WEIGHT)


@pytest.mark.slow
def test_a_run_of_4_2_2_3_and_1_ranks_is_that_of_one_process(results):
    assert_same_student(results / "legs", results / "whole")
    rows = [[(r.kind, r.step) for r in read_metrics(results / name)] for name in ("legs", "whole")]
    assert [row for row in rows[0] if row[0] == "step"] == [row for row in rows[1] if row[0] == "step"]
    losses = [[r.metrics["loss"] for r in read_metrics(results / n) if r.kind == "step"] for n in ("legs", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_divided_weights_is_evaluated_by_its_name(results, capsys):
    newest = max((results / "killed" / "checkpoints").glob("step-*"))
    assert (newest / "parts").is_dir()
    assert main(["eval", str(newest), "--limit", "4"]) == 0, capsys.readouterr()
    assert newest.name in capsys.readouterr().out


@pytest.mark.slow
def test_adapters_on_divided_weights_are_saved_merged_and_beside_the_student(results):
    assert_same_student(results / "adapters-2", results / "adapters-1")
    own, theirs = (load_file(results / f"adapters-{n}" / "adapter" / "adapter_model.safetensors") for n in (2, 1))
    assert own.keys() == theirs.keys() and own
    for name, weight in own.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=WEIGHT)


@pytest.mark.slow
def test_a_killed_rank_takes_the_run_down_by_its_name_and_resume_goes_on_from_the_last_checkpoint(seen):
    killed = seen["killed"]
    assert killed["codes"] == [1, 1, -signal.SIGKILL] and killed["took"] < MINUTE
    assert re.search(r"error: (rank 1 and )?rank 2 ended without a word", killed["words"][0])
    assert "the last checkpoint is where to begin" in killed["words"][0]
    assert killed["saved"] % 2 == 0 and killed["saved"] >= killed["reached"] - 2
    assert killed["again"]["codes"] == [0, 0], killed["again"]["words"]
    assert killed["again"]["rows"] == killed["saved"] + 2


@pytest.mark.slow
def test_what_was_trained_is_saved_where_a_rank_ends_in_order(seen):
    bad = seen["bad data"]
    assert "error: rank 1: prompt 3 is empty." in bad["words"][0]
    assert bad["codes"] == [1, 0] and bad["saved"] == BAD_STEP
    assert "Traceback" not in "".join(bad["words"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"optimizer__name": "muon"}, r"optimizer\.name=muon .* Set optimizer\.name=adamw, or train\.parallel=ddp"),
        (
            {"optimizer__name": "natural_gradient"},
            r"natural_gradient .* Set optimizer\.name=adamw, or train\.parallel=ddp",
        ),
        (
            {"student__dtype": "float16", "student__lora__rank": 4},
            r"student\.dtype=float16 .* Set student\.dtype=bfloat16, or train\.parallel=ddp",
        ),
        ({"teacher__offload": True}, r"teacher\.offload moves whole weights.* Drop it, or set train\.parallel=ddp"),
        ({"teacher__device": "cpu"}, r"teacher\.device=cpu is not the student's.* Set teacher\.device=auto"),
        (
            {"teacher__load_options__quantization": "bitsandbytes-4bit"},
            r"teacher\.load_options .* Drop it, or set train\.parallel=ddp",
        ),
    ],
)
def test_what_divided_weights_cannot_do_is_refused(world, tmp_path, more, said):
    recipe = build(merge({}, settings(world, tmp_path / "run", train__parallel="fsdp2", **more)))
    with pytest.raises(ConfigError, match=said):
        check_ranks(recipe, 2)
    check_ranks(recipe, 1)
