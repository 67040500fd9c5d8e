"""What the GPU kernels cost by counting: the page is that of its numbers, and these are what the kernels are compiled to and move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from benchmarks import RESULTS, ROOT
from benchmarks.kernel_cost.command import page, predicted_ms

KEPT = json.loads((RESULTS / "kernel_cost.json").read_text("utf-8"))
GOAL_MS = 72.0
"""Of reverse KL by the roofline, forward and backward."""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def run(code: str, **more: str) -> str:
    """What a program prints in a process of its own: kernels are either compiled or interpreted."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT | more, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_page_is_that_of_its_numbers():
    assert page(KEPT) == (RESULTS / "kernel_cost.md").read_text("utf-8")


def test_no_kernel_spills_and_four_rows_fit_a_multiprocessor():
    assert len(KEPT["registers"]) > 20
    assert all(one["spilled"] == 0 and one["blocks"] >= 4 for one in KEPT["registers"].values())


def test_the_roofline_s_total_is_within_the_goal_also_with_the_trainer_s_metrics():
    for name in ("reverse KL", "reverse KL with the trainer's metrics"):
        assert sum(predicted_ms(KEPT["traffic"][name]).values()) <= GOAL_MS


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [
        (32, 8, 0, 8),
        (33, 8, 0, 6),
        (48, 8, 32, 5),
        (64, 8, 0, 4),
        (255, 8, 0, 1),
        (32, 8, 100 << 10, 2),
        (24, 1, 0, 32),
    ],
)
def test_blocks_of_a_multiprocessor_are_those_of_the_occupancy_calculator(registers, warps, shared, blocks):
    pytest.importorskip("triton")
    from benchmarks.kernel_cost.registers import blocks_at_once

    assert blocks_at_once(registers, warps, shared) == blocks


@pytest.mark.slow
def test_registers_are_those_that_ptxas_says_now():
    pytest.importorskip("triton")
    names = ["statistics, with diagnostics", "moments, generalized_jsd", "gradient, reverse_kl"]
    said = run(
        "import json, tempfile, pathlib\n"
        "from benchmarks.kernel_cost.registers import compiled, launches\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "from benchmarks.kernel_cost.command import told\n"
        f"print(json.dumps({{o.name: told(o, compiled(o, folder)) for o in launches() if o.name in {names}}}))"
    )
    found = json.loads(said.splitlines()[-1])
    if version("triton") == KEPT["triton"]:
        assert found == {name: KEPT["registers"][name] for name in names}
    assert found.keys() == set(names)
    assert all(one["spilled"] == 0 and one["blocks"] >= 4 for one in found.values())


@pytest.mark.slow
def test_every_kernel_that_a_loss_launches_is_in_the_table():
    """By kernel, divergence and flags, of the losses whose traffic is counted."""
    pytest.importorskip("triton")
    said = run(
        "import json\n"
        "from benchmarks.kernel_cost import registers, traffic\n"
        "from opd.kernels.rows.triton import rows\n"
        "seen, plain = [], rows._launch\n"
        "flags = ('KIND', 'TEACHER', 'EXTRAS', 'ADD', 'HAS_REVERSE', 'HAS_FORWARD', 'SCALED', 'TOPS')\n"
        "def name(k): return k.fn.__name__ if hasattr(k, 'fn') else k.__name__\n"
        "def key(k, c): return [name(k), *[c.get(flag) for flag in flags]]\n"
        "def launch(k, *a, **c): seen.append(key(k, c)); plain(k, *a, **c)\n"
        "rows._launch = launch\n"
        "for loss in traffic.losses().values(): traffic.counted(*loss, 2560, 8)\n"
        "known = [key(one.kernel, one.constants) for one in registers.launches()]\n"
        "print(json.dumps([one for one in seen if one not in known]), len(seen))",
        TRITON_INTERPRET="1",
    )
    assert said.splitlines()[-1] == "[] 11"


@pytest.mark.slow
def test_a_reverse_kl_reads_both_logits_twice_and_writes_16_bits_whatever_metrics_are_asked_for():
    pytest.importorskip("triton")
    said = run(
        "import json, dataclasses\n"
        "from benchmarks.kernel_cost import traffic\n"
        "losses = traffic.losses()\n"
        "names = list(losses)[:2]\n"
        "print(json.dumps([dataclasses.asdict(traffic.counted(*losses[n], 2560, 16)) for n in names]))",
        TRITON_INTERPRET="1",
    )
    plain, watched = json.loads(said.splitlines()[-1])
    entries = 16 * 2560
    assert plain["kernel_bytes"] == (8 + 8 + 2) * entries
    assert watched["kernel_bytes"] == plain["kernel_bytes"] + 2 * 16 * 1024 * 4, "the lanes' largest logits"
    assert watched["products"] == plain["products"] == 2 * 2 + 2 and watched["kernels"] == plain["kernels"] == 4
