"""Copies are trimmed by whole definitions, and what is left has all that it reads."""

from __future__ import annotations

import ast
import builtins

from tools.verl_patch.modules import module_of
from tools.verl_patch.sources import Copy, copied_files, new_name

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
