"""Peak memory, as the kernel saw it: two chunks of logits beside the gradients, one under a top-k, none at all when asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from memory_probe import CHUNK, HIDDEN, TOKENS, VOCAB

FLOAT = 4
MIB = 1 << 20
GRADIENTS = (VOCAB + TOKENS) * HIDDEN * FLOAT
LOGITS = CHUNK * VOCAB * FLOAT
PIECES = 8 * MIB // 4  # rows are worked on in pieces of a quarter MiB, of which a few are alive at once
# autograd keeps about a dozen copies of such a piece for losses that have no closed form
AUTOGRAD = 12 * MIB // 4
PACKED = 4 * MIB  # what the library packs operands in depends on the processor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.serial,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's memory high-water mark"),
]


@cache
def peak(case: str) -> int:
    """Bytes beyond the inputs. Freed buffers go back to the system at once, so that only what is alive is counted."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    script = Path(__file__).with_name("memory_probe.py")
    done = subprocess.run(
        [sys.executable, str(script), case], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["peak"]


@pytest.mark.parametrize(("case", "logits"), [("products", 2 * LOGITS), ("products of one model", LOGITS)])
def test_the_bare_products_take_their_results_and_what_the_library_packs(case, logits):
    """What the bounds below start from."""
    assert 0.98 * (GRADIENTS + logits) <= peak(case) <= GRADIENTS + logits + PACKED


@pytest.mark.parametrize("case", ["reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl"])
def test_a_whole_teacher_takes_two_chunks_of_logits_beside_the_gradients(case):
    assert peak(case) <= peak("products") + PIECES


def test_a_loss_without_a_closed_form_takes_hardly_more():
    assert peak("total_variation") <= peak("products") + PIECES + AUTOGRAD


@pytest.mark.parametrize("case", ["top_k", "log_prob"])
def test_a_few_tokens_of_the_student_take_one_chunk(case):
    assert peak(case) <= peak("products of one model") + PIECES


@pytest.mark.parametrize("case", ["minimal", "minimal jsd", "minimal top_k"])
def test_minimal_memory_is_a_few_mib_beside_the_gradients(case):
    assert peak(case) <= GRADIENTS + 10 * MIB


def test_the_plain_version_takes_many_times_as_much():
    """So that the numbers above are known to measure something."""
    assert peak("reference") > 4 * TOKENS * VOCAB * FLOAT > 2 * (GRADIENTS + 2 * LOGITS)
