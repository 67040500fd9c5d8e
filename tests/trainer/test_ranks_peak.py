"""The memory of a rank that has a quarter of the weights, as the system counts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from peak_ranks import WORLD
from rank_checks import run_program

PROGRAM = Path(__file__).with_name("peak_ranks.py")
STATES = 4
"""Weights, gradients and AdamW's two moments, in float32."""
ROUNDED_UP = 1.15


@pytest.mark.endurance
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_the_peak_of_a_process_is_its_part_of_the_states_a_gathered_layer_and_activations(tmp_path):
    # With this threshold of malloc, freed memory goes back to the system at once.
    said = run_program(PROGRAM, tmp_path, timeout=600, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    for rank in json.loads(said.splitlines()[-1]):
        bound = ROUNDED_UP * STATES * rank["whole"] / WORLD + rank["layer"] + rank["activations"]
        assert 0.8 * bound < rank["peak"] <= bound, rank
