"""verl 0.8 through its adapter: the engine tests again, in an environment with verl 0.8.0 (`constraints-verl080.txt`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from verl.utils.device import get_device_name
from verl.workers.engine import BaseEngine, EngineRegistry
from verl_runs import main_ppo, make_folder, recomputed, reverse_kl

from opd.integrations.verl.plugin.base_engines import register_engine

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("OPD_VERL080", ROOT / ".venv-verl080" / "bin" / "python"))


def test_an_engine_of_ours_comes_before_one_that_was_there_first(monkeypatch: pytest.MonkeyPatch):
    """Here as this release has it, by vendor; `test_the_engine_tests_pass_with_verl_0_8` runs the other branch."""
    monkeypatch.setattr(EngineRegistry, "_engines", {})
    EngineRegistry.register(model_type="language_model", backend="fsdp2", device=get_device_name())(BaseEngine)
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is BaseEngine

    @register_engine(model_type="language_model", backend="fsdp2")
    class Ours(BaseEngine):
        pass

    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is Ours


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three minutes on two idle cores; runs of Ray beside it may take most of them
@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there: constraints-verl080.txt says how to make it")
def test_the_engine_tests_pass_with_verl_0_8():
    env = {
        **os.environ,
        "VERL_USE_EXTERNAL_MODULES": "verl080_cpu",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_engine.py")),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1180)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there: constraints-verl080.txt says how to make it")
def test_a_real_run_of_verl_0_8_trains_on_what_plain_transformers_compute(tmp_path: Path):
    folder, here = make_folder(tmp_path), str(Path(__file__).parent)
    done = main_ppo(
        folder,
        "+opd=default",
        f"opd.teacher.model={folder}/teacher",
        f"opd.trace={folder}/trace",
        "trainer.total_training_steps=2",
        "+ray_kwargs.ray_init.resources={cpu:8}",
        python=str(PYTHON),
        VERL_USE_EXTERNAL_MODULES="verl080_cpu,opd.integrations.verl.dry_run.register",
        PYTHONPATH=here,
    )
    assert done.code == 0, done.log[-4000:]
    per_token, said = recomputed(folder, folder / "trace", reverse_kl, "teacher")
    torch.testing.assert_close(said, per_token, atol=1e-5, rtol=0)
    first, second = (step["actor/opd/reverse_kl"] for step in done.metrics)
    assert first == pytest.approx(float(per_token.mean()), abs=1e-5)
    assert second < first
