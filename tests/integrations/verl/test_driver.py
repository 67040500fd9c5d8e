"""verl's own main, started as a user starts it: a mistake is told on the driver, before Ray takes a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from verl_runs import main_ppo, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("verl"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("opd.objective.divergence=reverse_kll", "'opd.objective.divergence' cannot be 'reverse_kll'"),
        ("opd.teacher.model=/nowhere", "opd.teacher.model='/nowhere' cannot be read"),
        ("distillation.enabled=true", "set distillation.enabled=false"),
        ("actor_rollout_ref.model.use_fused_kernels=true", "model.use_fused_kernels=true makes"),
    ],
)
def test_a_mistake_is_told_before_ray_starts(folder: Path, override: str, said: str):
    done = main_ppo(folder, "+opd=default", f"opd.teacher.model={folder}/teacher", override)
    assert done.code == 1
    assert said in done.log
    assert "ray init kwargs" not in done.log
