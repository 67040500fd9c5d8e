"""What of this package goes into verl's tree, under which name, with which imports.

Some modules are copied whole, and of every other one only the definitions that something copied reads: a method by its name, as an
attribute anywhere. What is left out is left out by whole definitions; the text of the rest is the package's own.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tools.verl_patch.modules import IMPORTS, ROOTS, Module, Statement, find, module_of

TREE = "tools.verl_patch.tree"
PLUGIN = "opd.integrations.verl.plugin"
FACE = f"{PLUGIN}.on_policy_distillation"
WHOLE = (FACE, f"{TREE}.step", f"{TREE}.teacher")
"""Modules that are copied whole, with what they read."""
STAND_INS = {
    ("opd.config.sections", "Section"): (f"{TREE}.sections", "Section"),
    ("opd.config.sections", "parse_section"): (f"{TREE}.sections", "parse_section"),
    ("opd.losses.objective", "Objective"): (f"{TREE}.full_vocabulary", "Objective"),
    ("opd.losses.diagnostics", "token_diagnostics"): (f"{TREE}.full_vocabulary", "token_diagnostics"),
    ("opd.kernels.spec", "Shards"): (f"{TREE}.row_level", "Shards"),
    ("opd.kernels.chunk_loop", "OutputLayer"): (f"{TREE}.row_level", "OutputLayer"),
    ("opd.kernels.rows.closed_form", "FewTokenRows"): (f"{TREE}.row_level", "FewTokenRows"),
    ("opd.kernels.few_tokens", "add_few_tokens"): (f"{TREE}.row_level", "absent"),
    ("opd.kernels.few_tokens", "policy_loss"): (f"{TREE}.row_level", "absent"),
    ("opd.kernels.few_tokens", "policy_loss_by_autograd"): (f"{TREE}.row_level", "absent"),
    ("opd.kernels.eos_groups", "MergedLogits"): (f"{TREE}.row_level", "absent"),
    ("opd.losses.groups", "merge_tokens"): (f"{TREE}.row_level", "absent"),
    ("opd.losses.groups", "merge_tokens_"): (f"{TREE}.row_level", "absent"),
    ("opd.losses.groups", "first_of"): (f"{TREE}.row_level", "absent"),
}
"""(module, name) → what is copied in its place: shorter, and the same for whole logits and a divergence over the whole vocabulary."""
CORE = "verl.trainer.ppo.opd_core"
MOVED = {FACE: "verl.trainer.ppo.on_policy_distillation", TREE: CORE, PLUGIN: CORE, "opd.teachers": CORE, "opd": CORE}
"""Where a module, or everything in a package, stands in verl's tree; the first that fits."""
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"
LINE = 120


def new_name(module: str) -> str:
    """The name in verl's tree of a module of ours."""
    old = next(old for old in MOVED if module == old or module.startswith(f"{old}."))
    return MOVED[old] + module.removeprefix(old)


def rewritten(text: str) -> str:
    """`text` with imports that hold in verl's tree."""
    ours = rf"(?:{'|'.join(ROOTS)})"
    text = re.sub(
        rf"(^\s*(?:from|import) )({ours}(?:\.\w+)+)", lambda m: m[1] + new_name(m[2]), text, flags=re.MULTILINE
    )
    left = re.search(rf"\b(?:from|import) {ours}\b", text)
    assert left is None, f"an import was left as it was: {left}"
    return text


def copied_files(version: str, readers: Iterable[str] = ()) -> dict[str, str]:
    """Path in verl's tree → text, of every copied module and the packages around them.

    `version` is ours; `readers` are texts of Python files that go there too, and import from the copied modules.
    """
    copy = Copy()
    for module in WHOLE:
        copy.keep_whole(module)
    for text in readers:
        copy.scan(ast.parse(text), None)
    copy.settle()
    files: dict[str, str] = {}
    for module in copy.kept:
        left_out = "" if module in WHOLE else ", without what nothing here reads"
        head = f"{LICENSE}# Copied from {module} of opd {version}{left_out}, by tools/verl_patch; change it there.\n"
        files[f"{new_name(module).replace('.', '/')}.py"] = head + rewritten(copy.text(module))
    core = PurePosixPath(CORE.replace(".", "/"))
    for folder in {folder for path in files for folder in PurePosixPath(path).parents if folder.is_relative_to(core)}:
        says = "The losses and row passes of on-policy distillation" if folder == core else f"Parts of opd.{folder.relative_to(core).as_posix().replace('/', '.')}"  # fmt: skip
        files[f"{folder}/__init__.py"] = f'{LICENSE}"""{says}, copied from the package opd."""\n'
    return dict(sorted(files.items()))


@dataclass
class Copy:
    """What is copied so far."""

    kept: dict[str, set[Statement]] = field(default_factory=lambda: defaultdict(set))
    """By module; imports are none of these."""
    ours: dict[str, dict[str, tuple[str, str]]] = field(default_factory=lambda: defaultdict(dict))
    """By module: a name that it imports → the module of ours that defines it, and the name there ('' for a module)."""
    others: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By module: the names that it imports from elsewhere."""
    attributes: set[str] = field(default_factory=set)
    """Names that are read as attributes anywhere."""
    methods: dict[tuple[str, Statement], set[ast.stmt]] = field(default_factory=dict)
    """By module and class: the methods that nothing reads so far."""

    def keep_whole(self, name: str) -> None:
        """Keep a module with everything in it."""
        module = module_of(name)
        for statement in module.statements:
            if not isinstance(statement.node, IMPORTS):
                self.kept[name].add(statement)
                self.scan(statement.node, name)
            if statement.names == ("__all__",):
                constants = (node.value for node in ast.walk(statement.node) if isinstance(node, ast.Constant))
                texts = [value for value in constants if isinstance(value, str)]
                for public in texts:
                    self.keep(name, public)

    def keep(self, name: str, word: str) -> None:
        """Keep what `word` stands for in a module, and what that reads."""
        module = module_of(name)
        statement = module.binding.get(word)
        if statement is None or statement in self.kept[name]:
            return  # a builtin, a parameter or a local variable; or known already
        if (name, word) in STAND_INS or module.imported(word) is not None:
            self.ours[name][word] = self.definition(name, word)
        elif isinstance(statement.node, IMPORTS):
            self.others[name].add(word)
        else:
            self.kept[name].add(statement)
            self._scan_kept(module, statement)

    def _scan_kept(self, module: Module, statement: Statement) -> None:
        node = statement.node
        if isinstance(node, ast.ClassDef) and all(_is_ours(module, base) for base in node.bases):
            apart: set[ast.stmt] = {
                n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("__")
            }
            self.methods[module.name, statement] = apart
            for part in (*node.bases, *node.keywords, *node.decorator_list, *(n for n in node.body if n not in apart)):
                self.scan(part, module.name)
        else:
            self.scan(node, module.name)

    def definition(self, name: str, word: str) -> tuple[str, str]:
        """The module of ours that defines a word of the module `name`, and the word there; it is kept."""
        if (name, word) in STAND_INS:
            return self.definition(*STAND_INS[name, word])
        if find(f"{name}.{word}") is not None:
            self.keep_whole(f"{name}.{word}")
            return f"{name}.{word}", ""
        source = module_of(name).imported(word)
        if source is not None:
            return self.definition(*source)
        self.keep(name, word)
        return name, word

    def scan(self, node: ast.AST, name: str | None) -> None:
        """Keep what a piece of code reads; `name` is the module where it stands, None for a file that is no module of ours."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and name is not None:
                self.keep(name, part.id)
            elif isinstance(part, ast.Attribute):
                self.attributes.add(part.attr)
            elif isinstance(part, ast.ImportFrom) and part.module is not None and find(part.module) is not None:
                for alias in part.names:  # this import is copied as it is written
                    if part.module in WHOLE:
                        self.keep(part.module, alias.name)
                    else:
                        home = self.definition(part.module, alias.name)
                        assert ".".join(home).rstrip(".") == f"{part.module}.{alias.name}", (
                            f"import {alias.name} from {home[0]}"
                        )

    def settle(self) -> None:
        """Keep the methods that something reads, until nothing more is read."""
        waiting = True
        while waiting:
            waiting = [
                (module, apart, method)
                for (module, _), apart in self.methods.items()
                for method in apart
                if isinstance(method, ast.FunctionDef) and method.name in self.attributes
            ]
            for module, apart, method in waiting:
                apart.remove(method)
                self.scan(method, module)

    def text(self, name: str) -> str:
        """The module's text with what is kept."""
        module = module_of(name)
        lines = [*module.lines[: module.head], "", *self._imports(module)]
        before: Statement | None = None
        for statement in module.statements:
            if statement in self.kept[name]:
                apart = statement.defines or (before is not None and before.defines)
                blank = 1 if before is None else int(not module.lines[statement.first - 2].strip())
                lines += [""] * (2 if apart else blank)
                lines += module.text_of(statement, self.methods.get((name, statement), set()))
                before = statement
        return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).rstrip("\n") + "\n"

    def _imports(self, module: Module) -> list[str]:
        """The imports that are needed, in three groups: the standard library, torch and verl, ours from where it is defined."""
        groups: tuple[list[str], list[str], list[str]] = ([], [], [])
        for statement in module.statements:
            node = statement.node
            if isinstance(node, IMPORTS) and self.others[module.name].intersection(statement.names):
                source = node.module if isinstance(node, ast.ImportFrom) else None
                used = [
                    alias
                    for alias in node.names
                    if (alias.asname or alias.name.split(".")[0]) in self.others[module.name]
                ]
                first = (source or used[0].name).split(".")[0]
                groups[first in ("torch", "verl")].append(_import_line(source, list(map(ast.unparse, used))))
        words: dict[str, list[str]] = defaultdict(list)
        for word, (home, original) in self.ours[module.name].items():
            source, there = (home, original) if original else home.rsplit(".", 1)
            words[source].append(there if there == word else f"{there} as {word}")
        groups[2].extend(
            _import_line(source, sorted(words[source], key=_order)) for source in sorted(words, key=new_name)
        )
        return "\n\n".join("\n".join(group) for group in groups if group).split("\n")


def _is_ours(module: Module, base: ast.expr) -> bool:
    """The class is one of ours, so that nobody else calls its methods."""
    if not isinstance(base, ast.Name) or base.id not in module.binding:
        return False
    return module.imported(base.id) is not None or not isinstance(module.binding[base.id].node, IMPORTS)


def _order(word: str) -> tuple[bool, bool, str]:
    return not word.isupper(), not word[0].isupper(), word


def _import_line(source: str | None, words: list[str]) -> str:
    if source is None:
        return f"import {', '.join(words)}"
    line = f"from {source} import {', '.join(words)}"
    if len(rewritten(line)) <= LINE:
        return line
    return f"from {source} import (\n" + "".join(f"    {word},\n" for word in words) + ")"
