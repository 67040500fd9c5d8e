"""What the GPU kernels of the fused loss cost, told on a CPU: registers of every kernel by ptxas, and bytes and launches of a loss.

`python -m benchmarks kernel_cost` compiles for compute capability 9.0 (H100, H200), counts a call's bytes with Triton's interpreter, and
writes benchmarks/results/kernel_cost.json and kernel_cost.md. A minute; it needs Triton, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import RESULTS
from benchmarks.markdown import table
from benchmarks.trl_environment import run_module

if TYPE_CHECKING:
    from benchmarks.kernel_cost.registers import Compiled, Launch

SIZE = {"tokens": 8192, "hidden": 4096, "vocabulary": 151_936, "chunk": 1088}
"""Of the kernels' goal; `kernels.spec.default_chunk` takes so many tokens at a time."""
FLOPS, BANDWIDTH = 660e12, 2.9e12
"""Of an H100 at these products in bfloat16, and of its memory, as they were measured by others; per second."""
BEFORE = {
    "reverse KL": "85 to 92",
    "reverse KL with the trainer's metrics": "152 to 159",
}
"""At commit 9263a82, by the same arithmetic: eager diagnostics moved 145 bytes per vocabulary entry in 80 pieces."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernel_cost", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for kernel_cost.json and kernel_cost.md")
    options = parser.parse_args(argv)
    found = {"triton": version("triton"), "registers": registers(), "traffic": traffic(), "size": SIZE}
    (options.results / "kernel_cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    (options.results / "kernel_cost.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def registers() -> dict[str, Any]:
    from benchmarks.kernel_cost.registers import all_compiled

    return {name: told(launch, said) for name, (launch, said) in all_compiled().items()}


def told(launch: Launch, said: Compiled) -> dict[str, Any]:
    """What the results keep of a kernel."""
    return asdict(said) | {"block": launch.constants["BLOCK"], "warps": launch.warps}


def traffic() -> dict[str, Any]:
    """In a process of its own: kernels that were compiled cannot be interpreted."""
    module, asked = "benchmarks.kernel_cost.traffic", json.dumps(SIZE)
    with tempfile.TemporaryDirectory() as folder:
        return run_module(sys.executable, module, Path(folder), asked, threads=1, TRITON_INTERPRET="1")


def predicted_ms(one: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the products, which hide their own traffic, and of what runs between them."""
    return {
        "products": 1e3 * one["flop"] / FLOPS,
        "kernels": 1e12 * one["kernel_gb"] / BANDWIDTH,
        "operators": 1e12 * one["operator_gb"] / BANDWIDTH,
    }


def page(found: dict[str, Any]) -> str:
    size = found["size"]
    compiled = [
        [
            name,
            f"{one['block']} × {one['warps']}",
            str(one["registers"]),
            str(one["spilled"]),
            str(one["shared"]),
            str(one["blocks"]),
        ]
        for name, one in found["registers"].items()
    ]
    calls = []
    for name, one in found["traffic"].items():
        parts = predicted_ms(one)
        calls.append(
            [
                name,
                f"{one['flop'] / 1e12:.1f}",
                f"{one['kernel_gb']:.1f}",
                f"{one['operator_gb']:.2f}",
                str(one["kernels"]),
                str(one["operators"]),
                str(one["waits"]),
                *(f"{part:.1f}" for part in parts.values()),
                f"{sum(parts.values()):.1f}",
                BEFORE.get(name, ""),
            ]
        )
    return (
        "# What the GPU kernels cost, told without a GPU\n\n"
        "## Registers\n\n"
        f"By ptxas for sm_90a, of Triton {found['triton']}. Lanes × warps is a thread block, which has one row; the last column is how many blocks a multiprocessor "
        "runs at the same time. At commit 9263a82 the statistics were 16384 × 8 warps with 255 registers and 236 bytes spilled: one block.\n\n"
        + table(["kernel", "lanes × warps", "registers", "spilled bytes", "shared bytes", "blocks"], compiled)
        + "\n\n## Traffic\n\n"
        f"Forward and backward, bfloat16, {size['tokens']:,} tokens, width {size['hidden']:,} of both models, {size['vocabulary']:,} columns, "
        f"{size['chunk']:,} tokens at a time. Counted in Triton's interpreter at small sizes and scaled; a product's own reads and writes are "
        f"not in it. Predicted: products at {FLOPS / 1e12:.0f} TFLOP/s, the rest at {BANDWIDTH / 1e12:.1f} TB/s, nothing overlapping. \"Before\" is "
        "commit 9263a82 by the same arithmetic.\n\n"
        + table(
            [
                "loss", "TFLOP", "kernels, GB", "operators, GB", "kernels", "operators", "waits",
                "products, ms", "kernels, ms", "operators, ms", "predicted, ms", "before, ms",
            ],
            calls,
        )
        + "\n"
    )  # fmt: skip
