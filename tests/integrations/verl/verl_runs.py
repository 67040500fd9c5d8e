"""`python -m verl.trainer.main_ppo` as a user starts it, on a CPU, under a time limit, with nothing left running."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl_world import REWARD, make_models, make_prompts, read_metrics

from opd.integrations.verl.dry_run.launch import cpu_environment, launch, ray_folder

TOKENS = 258  # of the byte tokenizer
Loss = Callable[..., Tensor]
LIMIT_SECONDS = 420.0  # a run of 3 steps takes about 60 on two idle cores


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run."""

    code: int
    log: str
    metrics: list[dict[str, float]]
    """verl's file logger, one per step."""


def overrides(folder: Path) -> list[str]:
    """GRPO on the tiny world: 4 prompts, 2 samples each, 12 tokens at the most."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "+opd_device=cpu",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=12",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={folder}/student",
        f"{rollout}.n=2",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=8",
        f"{actor}.optim.lr=1e-3",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",  # verl starts eight processes for it
        "trainer.total_epochs=1",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]


def make_folder(folder: Path) -> Path:
    """Everything that `overrides` names."""
    make_models(folder)
    make_prompts(folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


def main_ppo(
    folder: Path, *more: str, limit: float = LIMIT_SECONDS, python: str = sys.executable, **variables: str
) -> Done:
    """Run it; later overrides win. Everything of the run lives in folders of its own. `variables` join the environment."""
    metrics_path = Path(tempfile.mkdtemp(dir=folder)) / "metrics.jsonl"
    log_path = metrics_path.with_name("log.txt")
    with cpu_environment(metrics_path) as env:
        command = [python, "-m", "verl.trainer.main_ppo", *overrides(folder), *more]
        command += [f"+ray_kwargs.ray_init._temp_dir={ray_folder(env)}"]
        ended = launch(command, log=log_path, env=env | variables, limit=limit, folder=folder)
        if ended.code != 0:
            keep_worker_logs(Path(ray_folder(env)), log_path)
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    log = log_path.read_text(encoding="utf-8", errors="replace")
    return Done(code=-1 if ended.code is None else ended.code, log=log, metrics=metrics)


def keep_worker_logs(ray: Path, log: Path) -> None:
    """Append what the workers wrote: Ray forwards it late, and not at all from a run that is ending."""
    with log.open("a", encoding="utf-8") as out:
        for path in sorted(ray.glob("session_2*/logs/worker-*.err")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if "WorkerDict" in text:
                out.write(f"\n{path.name}\n{text[-1500:]}\n")


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def recomputed(folder: Path, trace: Path, loss: Loss, *teachers: str) -> tuple[Tensor, Tensor]:
    """The loss of each traced response token, sequence by sequence from whole logits in float64; and what the run said it was."""
    files = sorted(trace.glob("rank*_000001.safetensors"))
    assert files
    student, *experts = (
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager", dtype=torch.float64)
        for name in ("student", *teachers)
    )
    ours, said = [], []
    for file in files:
        data = load_file(file)
        losses = []
        with torch.no_grad():
            for start, end in pairwise(data["offsets"].tolist()):
                ids = data["input_ids"][start:end].unsqueeze(0)
                rows = [m(input_ids=ids).logits[0, :, :TOKENS].log_softmax(-1) for m in (student, *experts)]
                losses.append(loss(*rows))
        ours.append(torch.cat(losses)[data["predict_index"]])
        said.append(data["loss"].double())
    return torch.cat(ours), torch.cat(said)
