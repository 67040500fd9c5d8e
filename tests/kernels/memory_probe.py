"""Peak resident memory of one forward and backward beyond its inputs, in bytes, printed as JSON.

Called as `python memory_probe.py CASE`, with one malloc setting: freed buffers go back to the system at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from typing import Any

import torch

from opd.kernels import linear_divergence, linear_log_prob
from opd.types import Head, HiddenTarget, TopKTarget

TOKENS, HIDDEN, VOCAB, CHUNK, TOP_K = 512, 256, 32000, 128, 16

CASES: dict[str, dict[str, Any]] = {
    "products": {},
    "products of one model": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "generalized_jsd": {"divergence": "generalized_jsd"},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl"},
    "total_variation": {"divergence": "total_variation"},
    "top_k": {},
    "log_prob": {},
    "minimal": {"divergence": "reverse_kl", "memory": "minimal", "chunk_tokens": None},
    "minimal jsd": {"divergence": "generalized_jsd", "memory": "minimal", "chunk_tokens": None},
    "minimal top_k": {"memory": "minimal", "chunk_tokens": None},
    "reference": {"impl": "reference", "chunk_tokens": None},
}


class Inputs:
    def __init__(self, tokens: int, vocab: int) -> None:
        self.hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
        self.weight = (torch.randn(vocab, HIDDEN) / HIDDEN**0.5).requires_grad_()
        self.teacher = HiddenTarget(
            hidden=torch.randn(tokens, HIDDEN), head=Head(weight=torch.randn(vocab, HIDDEN) / HIDDEN**0.5)
        )
        self.ids = torch.randint(vocab, (tokens,))
        top = torch.randint(vocab, (tokens, TOP_K))
        self.top_k = TopKTarget(ids=top, teacher_logp=torch.full(top.shape, -5.0))

    def products(self, *, teacher: bool) -> None:
        """Logits of one model or two, a chunk at a time, and both gradients of the student's."""
        hidden, weight, head = self.hidden.detach(), self.weight.detach(), self.teacher.head
        logits = [torch.empty(CHUNK, len(weight)) for _ in range(1 + teacher)]
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            torch.mm(hidden[rows], weight.T, out=logits[0])
            if teacher:
                torch.mm(self.teacher.hidden[rows], head.weight.T, out=logits[1])
            torch.mm(logits[0], weight, out=hidden_grad[rows])
            weight_grad.addmm_(logits[0].T, hidden[rows])

    def once(self, case: str) -> None:
        """A forward and a backward; or the matrix products alone, whose operands the library packs in buffers of its own."""
        if case.startswith("products"):
            self.products(teacher=case == "products")
            return
        if case == "log_prob":
            logp, entropy = linear_log_prob(self.hidden, self.weight, self.ids, chunk_tokens=CHUNK)
            (logp + entropy).sum().backward()
            return
        target = self.top_k if case.endswith("top_k") else self.teacher
        settings = {"chunk_tokens": CHUNK} | CASES[case]
        linear_divergence(self.hidden, self.weight, target, response_ids=self.ids, **settings).loss.backward()


def status(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(case: str) -> None:
    torch.set_num_threads(1)
    Inputs(CHUNK, 2048).once(case)  # whatever is loaded and packed once
    inputs = Inputs(TOKENS, VOCAB)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
        reset.write("5")  # the high-water mark starts again from here
    inputs.once(case)
    print(json.dumps({"peak": status("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
