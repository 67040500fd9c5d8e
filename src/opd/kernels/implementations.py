"""The choice of an implementation: how the chunks are run, and by which row pass."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Literal, get_args

from opd.errors import MissingDependencyError, ObjectiveError
from opd.kernels.autograd_function import Run
from opd.kernels.chunk_loop import run_chunks
from opd.kernels.closed_form import has_closed_form
from opd.kernels.head import HeadSpec
from opd.kernels.inputs import Memory
from opd.kernels.minimal import run_blocks
from opd.kernels.row_spec import RowSpec
from opd.kernels.rows.autograd import AutogradRows
from opd.kernels.rows.closed_form import closed_form_rows
from opd.kernels.rows.reference import run_whole

Impl = Literal["auto", "reference", "chunked", "triton"]


def choose_run(impl: Impl, memory: Memory, head: HeadSpec, rows: RowSpec) -> Run:
    """`auto` takes Triton on CUDA when it is installed, else PyTorch. A named implementation that cannot run raises."""
    for name, value, choices in (("impl", impl, get_args(Impl)), ("memory", memory, get_args(Memory))):
        if value not in choices:
            raise ObjectiveError(f"{name}={value!r} is not one of {', '.join(choices)}.")
    if memory == "minimal":
        if impl not in ("auto", "chunked"):
            raise ObjectiveError(f"memory='minimal' is an implementation of its own; use impl='auto', not '{impl}'.")
        return run_blocks
    has_triton = importlib.util.find_spec("triton") is not None
    if impl == "reference":
        if not rows.columns.shards.alone:
            raise ObjectiveError("impl='reference' works on whole vocabularies; use impl='chunked' with a group.")
        return run_whole
    if impl == "triton" or (impl == "auto" and head.hidden.is_cuda and has_triton):
        if not has_triton:
            raise MissingDependencyError(
                "impl='triton' needs Triton, which is not installed: pip install triton, or use impl='chunked'."
            )
        if not head.hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ObjectiveError(
                f"impl='triton' runs on CUDA, but the hidden states are on {head.hidden.device}; use impl='chunked', or set "
                "TRITON_INTERPRET=1 to check the kernels slowly on a CPU."
            )
        from opd.kernels.rows.triton import TritonRows, has_kernels

        return partial(run_chunks, row_pass_of=TritonRows if has_kernels(rows) else AutogradRows)
    return partial(run_chunks, row_pass_of=closed_form_rows if has_closed_form(rows) else AutogradRows)
