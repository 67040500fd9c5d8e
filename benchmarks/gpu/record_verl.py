"""`python -m benchmarks.gpu.record_verl`, in an environment with verl: the micro-batch that the part `verl` reads where verl is not.

The plugin's engine makes one step on a CPU, and the logits of both models are those of plain transformers on the same token ids.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.gpu.verl import RECORDED, TESTS

TOKENS = 258
"""Of the byte tokenizer."""


def main() -> None:
    os.environ["VERL_PLATFORM"] = "cpu"  # before the first import of verl
    sys.path.insert(0, str(TESTS))
    from verl_engines import batch, engine, step  # pyright: ignore[reportMissingImports]
    from verl_world import make_models  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        data = batch()
        rows = list(zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True))
        logits = {f"{name}_logits": _logits(models / name, rows) for name in ("student", "teacher")}
        loss, _, _ = step(engine(models), data)
    ids = torch.cat([response for _, response in rows])
    save_file({**logits, "response_ids": ids, "engine_loss": torch.tensor(loss)}, RECORDED)
    print(f"{RECORDED}: {len(ids)} response tokens, loss {loss:.6f}")


@torch.no_grad()
def _logits(folder: Path, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[response tokens, vocabulary]: what predicts each response token, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, response in rows:
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        found.append(model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, at, :TOKENS])
    return torch.cat(found).contiguous()


if __name__ == "__main__":
    main()
