"""Products of 16-bit operands with a result of 32 bits, as CUDA has them, for tests on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opd.kernels import chunk_loop


@pytest.fixture
def mixed(monkeypatch) -> list[torch.dtype]:
    """The branch of CUDA on a CPU: operands are rounded where it rounds them, and products run in float32. Holds their dtypes."""
    seen: list[torch.dtype] = []

    def product(plain):
        def call(*args, out_dtype=None, out=None, **more):
            if out_dtype is None:
                return plain(*args, out=out, **more)
            operands = args[-2:]
            assert out_dtype == torch.float32 and operands[0].dtype == operands[1].dtype
            seen.append(operands[0].dtype)
            made = plain(*args[:-2], *(operand.float() for operand in operands), **more)
            return made if out is None else out.copy_(made)

        return call

    init = chunk_loop.OutputLayer.__init__

    def as_on_cuda(self, weight, bias, **more):
        init(self, weight, bias, **more)
        self.mixed = not self.same

    monkeypatch.setattr(chunk_loop.OutputLayer, "__init__", as_on_cuda)
    own = {name: getattr(torch, name) for name in dir(torch)} | {"mm": product(torch.mm), "addmm": product(torch.addmm)}
    monkeypatch.setattr(chunk_loop, "torch", SimpleNamespace(**own))
    return seen
