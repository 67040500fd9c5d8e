"""The vocabulary split over ranks that talk by gloo: every rank gets the numbers that one process with all of it would get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import GRADIENTS, World, assert_same, run
from parallel_ranks import CLOSED, SPLITS, VOCAB, call, cases, log_prob, make, named

TIMEOUT = 240  # seconds; a run takes ten to twenty

EVERY_SPLIT = [
    pytest.param(split, marks=pytest.mark.endurance if len(sizes) > 2 else ()) for split, sizes in SPLITS.items()
]
"""Those over more than two processes are slow on two cores: `make endurance` has them."""

pytestmark = pytest.mark.slow


class Ranks:
    """Results of all ranks, by split and case."""

    def __init__(self) -> None:
        self.started: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, folder: Path, ranks: int) -> list[dict[str, Any]]:
        if ranks not in self.started:
            self.started[ranks] = self._run(folder, ranks)
        return self.started[ranks]

    @staticmethod
    def _run(folder: Path, ranks: int) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("parallel_ranks.py")
        outputs = [folder / f"{ranks}.{rank}.pt" for rank in range(ranks)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(ranks), str(folder / f"init{ranks}"), str(output)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, output in enumerate(outputs)
        ]
        said = []
        try:
            for process in processes:
                said.append(process.communicate(timeout=TIMEOUT)[0])
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)[-4000:]
        return [torch.load(output, weights_only=True) for output in outputs]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    folder, runs = tmp_path_factory.mktemp("ranks"), Ranks()
    return lambda count: runs(folder, count)


def tolerance(settings: dict[str, Any]) -> float:
    return 1e-11 if settings.get("dtype", torch.float64) == torch.float64 else 2e-5


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("split", EVERY_SPLIT)
def test_every_rank_has_the_numbers_of_one_process(ranks, split, name):
    sizes = SPLITS[split]
    kind, settings = cases()[name]
    world, left = make(settings)
    wanted = call(world, kind, left, slice(0, VOCAB))
    assert not any(value.isnan().any() for value in wanted.values())
    found = [result[f"{split}: {name}"][0] for result in ranks(len(sizes))]
    together = {key: value for key, value in found[0].items() if key not in ("d_weight", "d_bias")}
    for key in ("d_weight", "d_bias"):
        if key in found[0]:
            together[key] = torch.cat([part[key] for part in found])
    for one in found:  # every rank has the loss, what is per token, and the gradient of the hidden states
        same = {key: value for key, value in one.items() if key not in ("d_weight", "d_bias")}
        plain = {key: value for key, value in wanted.items() if key in same}
        for key in plain:
            assert torch.equal(same[key].isinf(), plain[key].isinf())
            same[key], plain[key] = same[key].nan_to_num(9e9, 0.0, 0.0), plain[key].nan_to_num(9e9, 0.0, 0.0)
        assert_same(same, plain, tolerance(settings))
    for key in GRADIENTS:
        if key in wanted:
            assert_same({key: together[key]}, {key: wanted[key]}, tolerance(settings))


@pytest.mark.parametrize("split", EVERY_SPLIT)
def test_log_probs_and_their_gradients_are_those_of_one_process(ranks, split):
    found = [result[f"{split}: log_prob"][0] for result in ranks(len(SPLITS[split]))]
    wanted = log_prob(make({})[0], slice(0, VOCAB))
    for one in found:
        for key in ("logp", "entropy", "d_hidden"):
            torch.testing.assert_close(one[key], wanted[key], rtol=0, atol=1e-11)
    for key in ("d_weight", "d_bias"):
        torch.testing.assert_close(torch.cat([one[key] for one in found]), wanted[key], rtol=0, atol=1e-11)


@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_a_chunk_costs_one_message_two_for_a_mixture_and_one_for_the_response_tokens(ranks, divergence):
    """Row sums and those of a KL together, of a mixture apart; and the hidden states' gradient once, at the end."""
    messages = 1 if divergence["divergence"] in ("reverse_kl", "forward_kl", "forward_reverse_kl") else 2
    for result in ranks(2):
        seen = result[f"2 even: without response {named(divergence)}"][1]
        assert seen == {"all_gather_object": 1, "all_reduce": messages + 1}
        chunks = 3  # 13 tokens, 5 at a time
        seen = result[f"2 even: hidden {named(divergence)}"][1]
        assert seen == {"all_gather_object": 1, "all_reduce": (messages + 1) * chunks + 1}


def test_a_top_k_costs_no_more_collectives_than_whole_rows(ranks):
    for result in ranks(2):
        assert result["2 even: top_k alone"][1]["all_reduce"] <= 4 + 1


def test_extras_cost_no_collective(ranks):
    """A KL's one, and the response tokens'; as without."""
    for result in ranks(2):
        seen = result["2 even: dense reverse_kl with extras"][1]
        assert seen == {"all_gather_object": 1, "all_reduce": 2 + 1}


def test_frozen_hidden_states_are_not_added_up(ranks):
    for result in ranks(2):
        assert result["2 even: frozen hidden"][1]["all_reduce"] == 2
        assert result["2 even: frozen weight"][1]["all_reduce"] == 2 + 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reference", "impl='reference' works on whole vocabularies; use impl='chunked' with a group"),
        ("minimal", "memory='minimal' takes one teacher, a whole vocabulary"),
        (
            "teacher split otherwise",
            "rows of the student's vocabulary and 18 of a teacher's: split both at the same rows",
        ),
        ("logits split otherwise", "split both at the same rows (pad the smaller, and say so with valid_vocab)"),
    ],
)
def test_what_shards_cannot_do_is_refused(ranks, name, message):
    assert message in ranks(2)[0]["2 even: refusals"][name]


def test_a_sharded_parameter_is_gathered_once_and_gets_the_sum_of_all_ranks_gradients(ranks):
    world = World(13, 6, VOCAB)
    wanted = run(world, "dense", "reference", response_ids=None)
    results = [result["dtensor"] for result in ranks(2)]
    for found in results:
        gathers = [count for name, count in found["forward"].items() if "all_gather" in name]
        assert gathers == [2] and len(found["forward"]) == 1  # the weight's and the bias's
        assert all("reduce_scatter" in name and count == 2 for name, count in found["backward"].items())
        assert "Shard(dim=0)" in found["placements"]
        for key in ("d_weight", "d_bias"):
            torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-12)
    assert sum(found["loss"].item() for found in results) == pytest.approx(wanted["loss"].item(), rel=1e-12)
    torch.testing.assert_close(torch.cat([f["d_hidden"] for f in results]), wanted["d_hidden"], rtol=0, atol=1e-12)
