"""Copies are trimmed by whole definitions, and what is left has all that it reads."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
from pathlib import Path

from tools.verl_patch.modules import find, module_of
from tools.verl_patch.sources import STAND_INS, Copy, copied_files, new_name

import opd

COPIED = copied_files("0")


def test_every_name_that_a_copied_file_reads_is_bound_in_it():
    for path, text in COPIED.items():
        tree = ast.parse(text)
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        bound |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        bound |= {(alias.asname or alias.name).split(".")[0] for n in imports for alias in n.names}
        bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        assert read <= bound | set(dir(builtins)) | {"__name__"}, (path, read - bound - set(dir(builtins)))


def test_a_method_is_kept_where_something_reads_its_name():
    copy = Copy()
    copy.keep("opd.errors", "ConfigError")
    copy.keep("opd.teachers.vocabulary", "VocabularyMatch")
    copy.settle()
    text = copy.text("opd.teachers.vocabulary")
    assert "size: int" in text and "def owns" not in text and "def check_vocabularies" not in text
    copy.scan(ast.parse("match.with_stand_ins(ids)"), None)
    copy.settle()
    text = copy.text("opd.teachers.vocabulary")
    assert "def with_stand_ins" in text and "def owns" in text  # which it calls
    assert "class DataError" not in copy.text("opd.errors")


def test_what_is_kept_is_the_packages_own_text():
    lines = set(module_of("opd.losses.divergences").lines)
    copied = COPIED[new_name("opd.losses.divergences").replace(".", "/") + ".py"].splitlines()[2:]
    assert [line for line in copied if line not in lines and "import" not in line] == []


def test_every_stand_in_stands_for_something():
    """A definition that was renamed would be copied whole again."""
    for places in STAND_INS.items():
        for module, name in places:
            found = find(module)
            assert found is not None and name in found.binding, (module, name)


COMPARED = """
import torch
from opd.integrations.verl.plugin import logits as ours
from opd.losses import Objective
from verl.trainer.ppo.opd_core import logits as copied
from verl.trainer.ppo.opd_core.full_vocabulary import Objective as Copied

generator = torch.Generator().manual_seed(0)
student, *teachers = (3.0 * torch.randn(23, 301, generator=generator) for _ in range(3))
teachers[0][3, :5], student[4, 7] = -torch.inf, -torch.inf
student[9] *= 60.0  # its sums leave the middle of float32's range
weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
jsd = [{"divergence": "generalized_jsd", "beta": beta, "normalize": n} for beta in (0.0, 0.3, 0.7) for n in (True, False)]
shapes = [{"divergence": "reverse_kl"}, {"divergence": "forward_kl"}, {"divergence": "skew_reverse_kl", "beta": 0.3}, *jsd]
count = 0
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for shape in shapes:
        for temperature in (1.0, 2.0):
            for mixture in ("", "probability", "logit", "loss"):
                for watch in (True, False):
                    found = []
                    for module, kind in ((ours, Objective), (copied, Copied)):
                        z = student.to(dtype).requires_grad_(True)
                        objective = kind(**shape, student_temperature=temperature, teacher_temperature=temperature)
                        told = module.token_losses(
                            z, [t.to(dtype) for t in (teachers if mixture else teachers[:1])], objective, vocab=299,
                            positions=torch.arange(1, 23, 2), teacher_weights=weights, mixture=mixture or "probability",
                            student_scale=0.7, masked_ids=(2,), watch=watch,
                        )
                        finite = told.loss.isfinite()
                        (slope,) = torch.autograd.grad(told.loss[finite].sum(), z)
                        found.append((told.loss, slope, *(told.metrics[name] for name in sorted(told.metrics))))
                    assert len(found[0]) == len(found[1])
                    for one, other in zip(*found):
                        assert torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0)), (dtype, shape, mixture)
                    count += 1
print(count)
"""


def test_the_copied_row_passes_give_the_packages_numbers_to_the_bit(tmp_path: Path):
    """Losses, gradients and diagnostics, in every precision, of mixtures, of rows that are computed again."""
    for path, text in COPIED.items():
        if "/opd_core/" in path:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(opd.__file__).parents[1])])
    words = [sys.executable, "-W", "ignore", "-c", COMPARED]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["576"]
