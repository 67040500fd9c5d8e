"""Moments that wait in main memory: they are on the device for the optimizer's step alone, and change no number."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opd.config.recipe import build, merge
from opd.errors import ConfigError
from opd.optim.offload import moments_on, move_moments
from opd.trainer.from_config import RunComponents
from worlds import settings

ELSEWHERE = torch.device("meta")
OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "muon": lambda model: torch.optim.Muon([model.weight], lr=0.1),
}


def trained(name: str, steps: int = 1) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    model.zero_grad()
    model(torch.arange(8.0).view(2, 4)).square().mean().backward()
    optimizer.step()


def moments(optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_moment_moves_and_the_counts_of_updates_stay(name):
    _, optimizer = trained(name)
    with moments_on(torch.device("cpu"), optimizer, home=ELSEWHERE):
        assert {tensor.device.type for tensors in moments(optimizer).values() for tensor in tensors} == {"cpu"}
    found = moments(optimizer)
    counts = found.pop("step", [])
    assert found and all(tensor.device == ELSEWHERE for tensors in found.values() for tensor in tensors)
    assert all(count.device.type == "cpu" and float(count) == 1 for count in counts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_beside_moments_that_were_away_is_the_same_step(name):
    model, optimizer = trained(name)
    stayed, theirs = trained(name)
    kept = {id(tensor): copy.deepcopy(tensor) for tensors in moments(optimizer).values() for tensor in tensors}
    move_moments(optimizer, torch.device("cpu"))
    assert all(torch.equal(kept.get(id(t), t), t) for tensors in moments(optimizer).values() for t in tensors)
    with moments_on(torch.device("cpu"), optimizer):
        step(model, optimizer)
    step(stayed, theirs)
    assert torch.equal(model.weight, stayed.weight) and torch.equal(model.bias, stayed.bias)


def test_moments_come_home_where_the_step_fails():
    _, optimizer = trained("adamw")
    with pytest.raises(RuntimeError), moments_on(torch.device("cpu"), optimizer, home=ELSEWHERE):
        raise RuntimeError
    assert moments(optimizer)["exp_avg"][0].device == ELSEWHERE


def test_the_first_step_has_no_moments_to_move_and_makes_them():
    model, optimizer = trained("adamw", steps=0)
    with moments_on(torch.device("cpu"), optimizer, home=ELSEWHERE):
        step(model, optimizer)
    assert {t.device.type for name, tensors in moments(optimizer).items() if name != "step" for t in tensors} == {
        "meta"
    }


def test_a_student_steps_with_its_moments_beside_it_and_rests_without(world, tmp_path, monkeypatch):
    """On a CPU, as on a device with memory of its own: where moments are is asked before and after every step."""
    parts = RunComponents(build(merge({}, settings(world, tmp_path / "run"))))
    student, seen = parts.student, []
    student.offload = True
    monkeypatch.setattr("opd.optim.offload.move_moments", lambda optimizer, device: seen.append((optimizer, device)))
    for optimizer in student.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: seen.append("step"))
    student._step([], 1.0)
    home = torch.device("cpu")
    assert seen == [one for o in student.optimizers for one in ((o, student.device), "step", (o, home))]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, r"trains on the CPU anyway; drop it"),
        ({"optimizer__name": "natural_gradient"}, r"natural_gradient has none\. Drop it"),
    ],
)
def test_an_offload_that_would_do_nothing_is_refused(world, tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        RunComponents(build(merge({}, settings(world, tmp_path / "run", optimizer__offload=True, **more))))
