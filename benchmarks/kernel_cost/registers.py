"""Every row kernel as it is launched, compiled for a GPU that need not be there: ptxas's registers and spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from opd.kernels.rows.triton import kernels, rows

CAPABILITY, PTX = 90, 88  # H100, H200; what ptxas for them reads
COLUMNS = 151_936
F32, F16, I32 = "*fp32", "*bf16", "i32"
# Of a streaming multiprocessor of compute capability 9.0 (CUDA C++ programming guide, technical specifications).
REGISTERS, WARPS, BLOCKS, SHARED, RESERVED = 65_536, 64, 32, 227 << 10, 1 << 10
REGISTERS_AT_A_TIME, WARPS_AT_A_TIME = 256, 4
MIXED = ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl", "alpha_beta_divergence", "total_variation")
KINDS = ("reverse_kl", "forward_kl", "forward_reverse_kl", *MIXED)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel with the constants that `TritonRows` gives it for rows of COLUMNS logits."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    out: str = F32
    """Type of what it writes."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What ptxas says, and what follows for one multiprocessor."""

    registers: int
    spilled: int
    """Bytes of stores and loads."""
    shared: int
    blocks: int
    """That a multiprocessor runs at the same time."""


def launches() -> list[Launch]:
    """The kernels of all losses; with a hybrid, an entropy bonus or a top-k, `EXTRAS`; a second teacher adds to the first's gradient."""
    lanes, block = rows.block_of(COLUMNS, rows.LANES), rows.block_of(COLUMNS, rows.MAX_BLOCK)
    plain = {
        "HAS_REVERSE": False,
        "HAS_FORWARD": False,
        "SCALED": False,
        "TOPS": False,
        "TEACHER": True,
        "BLOCK": lanes,
    }
    sums = {
        "reverse KL": {"HAS_REVERSE": True},
        "forward KL": {"HAS_FORWARD": True},
        "other divergences": {},
        "with diagnostics": {"HAS_REVERSE": True, "HAS_FORWARD": True, "TOPS": True},
        "diagnostics at another temperature": {"HAS_REVERSE": True, "HAS_FORWARD": True, "TOPS": True, "SCALED": True},
        "no teacher": {"TEACHER": False},
    }
    found = [
        Launch(
            name=f"statistics, {name}", kernel=kernels.statistics, constants={**plain, **more}, warps=rows.LANES_WARPS
        )
        for name, more in sums.items()
    ]
    for kind in MIXED:
        form = {"KIND": kind, "ORDER": True, "ZERO": False, "BLOCK": lanes}
        found.append(Launch(name=f"moments, {kind}", kernel=kernels.moments, constants=form, warps=rows.LANES_WARPS))
    wholes = {kind: {"KIND": kind, "TEACHER": True, "EXTRAS": False} for kind in KINDS}
    wholes["top-k or sampled"] = {"KIND": "reverse_kl", "TEACHER": False, "EXTRAS": True}
    wholes["log-prob alone"] = {"KIND": "none", "TEACHER": False, "EXTRAS": True}
    wholes["reverse_kl with reinforcement"] = {"KIND": "reverse_kl", "TEACHER": True, "EXTRAS": True}
    for name, more in wholes.items():
        form = {"ORDER": True, "ZERO": False, "ADD": False, "BLOCK": block, **more}
        found.append(
            Launch(name=f"gradient, {name}", kernel=kernels.gradient, constants=form, warps=rows.BLOCK_WARPS, out=F16)
        )
    added = {"KIND": "reverse_kl", "TEACHER": True, "EXTRAS": False, "ORDER": True, "ZERO": False, "ADD": True}
    name = "gradient, reverse_kl of a second teacher"
    found.append(
        Launch(name=name, kernel=kernels.gradient, constants={**added, "BLOCK": block}, warps=rows.BLOCK_WARPS)
    )
    times = {"BLOCK": rows.TIMES_BLOCK}
    return [*found, Launch(name="times", kernel=kernels.times, constants=times, warps=rows.BLOCK_WARPS, out=F16)]


def compiled(launch: Launch, folder: Path) -> Compiled:
    """Compile for the capability, and ask ptxas. Raises RuntimeError where its report cannot be read."""
    kernel: Any = launch.kernel
    names = kernel.arg_names
    types = {"rows": I32, "columns": I32, "entries": I32, **dict.fromkeys(("z_stride", "t_stride", "out_stride"), I32)}
    written = {"out": launch.out, "value": launch.out}
    signature = {
        name: "constexpr" if name in launch.constants else types.get(name, written.get(name, F32)) for name in names
    }
    whole = [
        name for name in names if name not in launch.constants and name != "rows"
    ]  # pointers, and sizes of 16's multiples
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": launch.warps, "ptx_version": PTX}
    )
    path = folder / "kernel.ptx"
    path.write_text(made.asm["ptx"], encoding="utf-8")
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    said = subprocess.run(
        [ptxas, "-v", f"-arch=sm_{CAPABILITY}a", path, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"ptxas says of {launch.name}: {said[-500:]}")
    used, shared = int(registers[1]), int(made.metadata.shared)
    return Compiled(
        registers=used,
        spilled=int(spilled[1]) + int(spilled[2]),
        shared=shared,
        blocks=blocks_at_once(used, launch.warps, shared),
    )


def all_compiled() -> dict[str, tuple[Launch, Compiled]]:
    with tempfile.TemporaryDirectory() as folder:
        return {one.name: (one, compiled(one, Path(folder))) for one in launches()}


def blocks_at_once(registers: int, warps: int, shared: int) -> int:
    """Thread blocks that fit a multiprocessor: registers are given to warps 256 at a time, and four warps at a time."""
    of_warp = -(-registers * 32 // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    by_registers = REGISTERS // of_warp // WARPS_AT_A_TIME * WARPS_AT_A_TIME // warps
    return min(by_registers, WARPS // warps, BLOCKS, SHARED // (shared + RESERVED))
