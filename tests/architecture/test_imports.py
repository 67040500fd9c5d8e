"""Who may import whom, read from the source: types ← losses ← kernels; the rooms of the data flow; trainer; the command line."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import opd

SOURCE = Path(opd.__file__).parent

GROUND = {"errors", "types", "seeding", "durable", "ranks", "joining"}
ROOMS = {"teachers", "samplers", "rewards", "data", "reporting", "optim"}
BELOW_TRAINER = {
    "config",
    "adapter",
    "folders",
    "load_errors",
    "models",
    "quantized",
    "tokenizer",
    "remote",
    "losses",
    "kernels",
    *GROUND,
    *ROOMS,
}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "seeding": set(),
    "durable": set(),
    "ranks": {"errors"},
    "joining": {"ranks", "errors"},
    "__main__": {"cli"},
    "folders": {"errors"},
    "load_errors": set(),
    "losses": {"types", "errors"},
    "kernels": {"types", "errors", "losses"},
    "adapter": {"folders", "errors"},
    "quantized": {"errors"},
    "models": {"adapter", "folders", "load_errors", "quantized", "types", "errors"},
    "tokenizer": {"adapter", "folders", "load_errors", "errors"},
    "remote": {"errors"},
    "config": {"types", "errors"},
    **{room: {"types", "errors"} for room in ROOMS},
    "doctor": BELOW_TRAINER,
    "trainer": {"doctor", *BELOW_TRAINER},
    "demo": BELOW_TRAINER,
    "serving": {"", "trainer", "doctor", *BELOW_TRAINER},
    "testing": {"types", "errors", "losses"},
    "integrations": {"types", "errors", "config", "losses", "kernels", "teachers", "reporting", "trainer"},
    "cli": {"", "trainer", "demo", "serving", "doctor", "integrations", *BELOW_TRAINER},
}

CROSS_EDGES = {
    ("config", "losses"): "the objective is a section of the recipe",
    ("config", "remote"): "addresses and names of keys are checked where they are written",
    ("data", "losses"): "packing weighs tokens by the objective's reduction",
    ("teachers", "losses"): "a teacher settles with the objective what it hands out",
    ("teachers", "kernels"): "a teacher's top-k comes from hidden states, chunk by chunk",
    ("teachers", "data"): "a teacher renders the prompt in its own way, and lays sequences out as the student does",
    ("teachers", "models"): "a local teacher is a Hugging Face model",
    ("teachers", "durable"): "kept scores outlive a kill",
    ("reporting", "durable"): "files of a run are replaced whole",
    ("reporting", "config"): "a report marks the keys that differ from the defaults",
    ("teachers", "remote"): "a teacher may be behind a server",
    ("samplers", "data"): "a sampler renders prompts",
    ("samplers", "models"): "a sampler asks a model for its context",
    ("samplers", "remote"): "a server's key is shown nowhere, and its words are read in one place",
    ("samplers", "seeding"): "samples are a pure function of the seed",
    ("optim", "ranks"): "a natural-gradient step is on the Fisher matrix of all ranks",
    ("optim", "seeding"): "a preconditioner's random gradients are a pure function of each rollout",
    ("samplers", "teachers"): "ids that are no token of both sides cannot be sampled (teachers.vocabulary)",
    ("optim", "config"): "an optimizer is built from its section",
    ("samplers", "ranks"): "ranks divide a batch of prompts",
    ("teachers", "ranks"): "means over the rollouts of all ranks",
    ("demo", "testing"): "the demo's models are the tiny ones",
    ("integrations", "data"): "samples of a run are recorded as text",
    ("integrations", "testing"): "the stand-ins of a dry run are tiny models",
    ("testing", "data"): "the byte tokenizer shares data.rendering's alphabet",
}

EXTRAS = {
    "peft",
    "datasets",
    "torchao",
    "bitsandbytes",
    "pyarrow",
    "tensorboard",
    "wandb",
    "math_verify",
    "reasoning_gym",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "vllm",
    "verl",
    "ray",
    "triton",
}
HOME_OF_AN_EXTRA = ("serving/", "teachers/server.py", "samplers/vllm.py", "integrations/", "kernels/rows/triton/")


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    at_import_time: bool
    """False inside a function and under TYPE_CHECKING."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path) -> Iterator[Import]:
    file = path.relative_to(SOURCE).as_posix()

    def walk(node: ast.AST, now: bool) -> Iterator[Import]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            now = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, now)
            return
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, name.name, now) for name in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield Import(file, node.lineno, full if _is_module(full) else str(node.module), now)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, now)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def _is_module(dotted: str) -> bool:
    where = SOURCE.parent.joinpath(*dotted.split("."))
    return dotted.startswith("opd.") and (where.with_suffix(".py").exists() or (where / "__init__.py").exists())


def room_of(file: str) -> str:
    """'losses/reduce.py' → 'losses', 'types.py' → 'types', '__init__.py' → ''."""
    first = file.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


FILES = sorted(SOURCE.rglob("*.py"))
ALL_IMPORTS = [found for path in FILES for found in imports_of(path)]
OWN_IMPORTS = [i for i in ALL_IMPORTS if i.module == "opd" or i.module.startswith("opd.")]


def _rooms_joined(found: Import) -> tuple[str, str]:
    parts = found.module.split(".")
    return room_of(found.file), parts[1] if len(parts) > 1 else ""


def test_the_source_was_found_and_read():
    joined = {_rooms_joined(i) for i in OWN_IMPORTS}
    assert {("trainer", "losses"), ("losses", "types"), ("cli", "trainer")} <= joined


def test_every_room_is_in_the_table():
    rooms = {room_of(path.relative_to(SOURCE).as_posix()) for path in FILES} - {""}
    assert rooms <= MAY_IMPORT.keys(), f"say in MAY_IMPORT what {rooms - MAY_IMPORT.keys()} may import"


def test_imports_point_one_way():
    wrong = []
    for found in OWN_IMPORTS:
        here, there = _rooms_joined(found)
        allowed = here in ("", there) or there in MAY_IMPORT.get(here, ()) or (here, there) in CROSS_EDGES
        if not allowed:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_every_cross_edge_is_still_there():
    """An edge that nobody needs any more must not stay open."""
    joined = {_rooms_joined(i) for i in OWN_IMPORTS}
    assert not CROSS_EDGES.keys() - joined


def test_a_cross_edge_never_points_up():
    assert not {there for _, there in CROSS_EDGES} & {"trainer", "cli", "integrations", "doctor", "demo"}


def test_rooms_below_the_trainer_do_not_know_it():
    up = [str(i) for i in OWN_IMPORTS if _rooms_joined(i)[1] in ("trainer", "cli") and room_of(i.file) in BELOW_TRAINER]
    assert not up


def test_no_module_imports_itself_in_a_circle():
    graph: dict[str, set[str]] = {}
    for found in OWN_IMPORTS:
        if found.at_import_time:
            graph.setdefault(_dotted(found.file), set()).add(found.module)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _dotted(file: str) -> str:
    return ".".join(("opd", *file.removesuffix(".py").removesuffix("/__init__").split("/"))).removesuffix(".__init__")


def test_losses_and_types_use_torch_and_the_standard_library_alone():
    known = {"torch", "opd", *sys.stdlib_module_names}
    optional = ("losses/_shapes.py", "jaxtyping")  # behind a guard: shapes are checked in tests only
    wrong = [
        str(i)
        for i in ALL_IMPORTS
        if room_of(i.file) in ("losses", *GROUND)
        and i.module.split(".")[0] not in known
        and (i.at_import_time or i.module.split(".")[0] != "jaxtyping")
        and (i.file, i.module.split(".")[0]) != optional
    ]
    assert not wrong


def test_an_optional_extra_is_imported_where_it_is_used():
    """Nothing breaks at import for want of an extra."""
    wrong = [
        str(i)
        for i in ALL_IMPORTS
        if i.at_import_time and i.module.split(".")[0] in EXTRAS and not i.file.startswith(HOME_OF_AN_EXTRA)
    ]
    assert not wrong


COLD = """
import sys
import opd
from opd.cli.main import main
for words in (["--help"], ["--version"], [], ["trian"]):
    main(words)
heavy = {"torch", "transformers", "pydantic", "yaml", "rich", "tyro", "numpy"} & set(sys.modules)
print("heavy:", sorted(heavy))
"""


def test_import_opd_and_its_help_are_cold():
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert "usage: opd COMMAND" in done.stdout


def _packages_with_names() -> list[str]:
    return [
        _dotted(path.relative_to(SOURCE).as_posix())
        for path in FILES
        if path.name == "__init__.py" and "__all__" in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("package", _packages_with_names())
def test_every_public_name_resolves(package: str):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None, f"{package}.{name}"
    assert len(set(module.__all__)) == len(module.__all__)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        opd.distil  # noqa: B018
