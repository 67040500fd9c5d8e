"""The parts of `python -m benchmarks gpu`, in order of value. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

FETCHED = ("tyro", "pydantic", "tenacity", "liger_kernel", "trl", "datasets")
"""Import names of requirements.txt; `make gpu-wheels` fetches them for a machine without network."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of its own, with a time limit of its own."""

    name: str
    shows: str
    """One sentence for the report."""
    share: float
    """Of the time that is left, relative to the shares of the parts that still have to run."""
    needs: tuple[str, ...] = ()
    """Packages without which the part is skipped; what one of its cases needs is looked up there."""


PARTS = (
    Part(
        name="truth",
        shows="Losses and gradients of both implementations on this device against float64, within the bounds of the tests.",
        share=2.0,
        needs=("torch",),
    ),
    Part(
        name="kernels",
        shows="Time, memory and error of the loss from hidden states, against the four matrix products and other libraries.",
        share=2.5,
        needs=("torch",),
    ),
    Part(
        name="step",
        shows="One update at the shapes of released models with random weights: where its time and its memory go.",
        share=2.5,
        needs=("torch", "transformers", "pydantic"),
    ),
    Part(
        name="run",
        shows="`opd demo` on this device: it learns, a killed run resumes, and two runs of one seed agree.",
        share=1.5,
        needs=("torch", "transformers", "tyro", "pydantic", "yaml", "rich", "jinja2", "tenacity", "httpx", "anyio"),
    ),
    Part(
        name="verl",
        shows="The verl integration's losses on this device: the plugin's engine where verl is installed, and the patch's row pass.",
        share=0.5,
        needs=("torch", "transformers"),
    ),
)
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "tyro",
    "pydantic",
    "liger_kernel",
    "trl",
    "flash_attn",
    "verl",
)
"""Packages that the report lists as present or missing."""


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of these packages that cannot be imported here."""
    return [name for name in names if not installed(name)]


def lacks(names: list[str]) -> str:
    """Error text for missing packages, with the command that fetches them."""
    fetched = [name for name in names if name in FETCHED]
    advice = f" `make gpu-wheels` fetches {', '.join(fetched)}." if fetched else ""
    return f"needs {', '.join(names)}, which this Python lacks.{advice}"


def installed(name: str) -> bool:
    """True if a package can be found; an entry None in `sys.modules` hides it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
