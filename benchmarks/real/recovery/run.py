"""One setting: make its model, measure it, and give its line."""

from __future__ import annotations

import resource
import shutil
import time

import torch

from benchmarks.real import chat, world
from benchmarks.real.recovery import arms
from benchmarks.real.recovery.measure import measure
from benchmarks.real.recovery.plan import ARMS, DAMAGED, ORIGINAL, RESULTS, SETTING, TUNING_SEED, Setting
from benchmarks.real.run import summary, train
from benchmarks.real.store import Row


def perform(setting: Setting, *, prompts: int = chat.HELD_OUT) -> Row:
    """Train, measure, and delete the model. The line `damaged` of a seed comes first, and makes what its arms begin with. Raises
    RuntimeError with the end of the log where `opd train` fails."""
    torch.set_num_threads(1)
    folder = world.work() / "recovery" / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    found = {"training_tokens": "", "training_kl": "", "cpu_seconds": "", "peak_gib": ""}
    model = folder / "student"
    if setting.arm == ORIGINAL:
        model = world.original()
    elif setting.arm == DAMAGED:
        began = time.process_time()
        model = arms.prepare(setting.seed) / "base"
        found["cpu_seconds"] = f"{time.process_time() - began:.1f}"
    elif ARMS[setting.arm].trainer:
        seconds = train(arms.recipe(setting), folder)
        said = summary(folder)
        found = {
            "training_tokens": said["tokens"],
            "training_kl": said["reverse_kl"],
            "cpu_seconds": f"{seconds:.1f}",
            "peak_gib": said["peak_gib"],
        }
    else:
        began = time.process_time()
        folder.mkdir(parents=True)
        found["training_tokens"] = str(arms.train_plainly(setting, model))
        found["cpu_seconds"] = f"{time.process_time() - began:.1f}"
        found["peak_gib"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"
    found |= measure(model, folder / "measured", everything=setting.seed != TUNING_SEED, prompts=prompts)
    shutil.rmtree(folder / "student", ignore_errors=True)
    assert set(found) == set(RESULTS), set(found) ^ set(RESULTS)
    return Row(dict(zip(SETTING, setting.key, strict=True)) | found)
