"""Ranks killed at random moments, one of them or all, never hang, and the resumed run ends as the one that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from kill_ranks import MINUTE, PHASES, VICTIMS
from rank_checks import run_program
from safetensors.torch import load_file

from opd.reporting.record import read_metrics

PROGRAM = Path(__file__).with_name("kill_ranks.py")


@pytest.mark.endurance
@pytest.mark.parametrize(("parallel", "count"), [("fsdp2", 10), ("ddp", 5)])
def test_kills_at_random_moments_change_nothing(world, tmp_path, parallel, count):
    seen = json.loads(run_program(PROGRAM, world, tmp_path, parallel, count, timeout=900).splitlines()[-1])
    kills = seen["kills"]
    assert len(kills) >= count and {tuple(kill["victims"]) for kill in kills} == set(VICTIMS)
    assert len({kill["saved"] for kill in kills}) >= PHASES, "the kills must fall in different phases of the run"
    for kill in kills:
        killed = [code == -signal.SIGKILL for code in kill["codes"]]
        assert [rank for rank, dead in enumerate(killed) if dead] == kill["victims"], kill
        assert kill["took"] < MINUTE, kill
        assert "Traceback" not in "".join(kill["words"]), kill
    reference = load_file(tmp_path / "reference" / "student" / "model.safetensors")
    rows = [(row.kind, row.step, row.metrics.get("loss")) for row in read_metrics(tmp_path / "reference")]
    for chain in map(Path, seen["chains"]):
        weights = load_file(chain / "student" / "model.safetensors")
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[name], reference[name]) for name in reference), chain
        assert [(row.kind, row.step, row.metrics.get("loss")) for row in read_metrics(chain)] == rows
