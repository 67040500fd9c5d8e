"""The model card of a trained student: what it is, what the run measured, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from opd.reporting.about import About, read_about
from opd.reporting.configuration import changed_keys
from opd.reporting.header import moment
from opd.reporting.summary import summary_cells, summary_notes, summary_rows

METHOD = "[on-policy distillation](https://arxiv.org/abs/2306.13649)"


def model_card(
    run_dir: Path, summary: Mapping[str, Any] | None, settings: Mapping[str, Any], *, dtype: str, adapter: bool
) -> str:
    """README.md of student/, or of adapter/. `settings` are the whole recipe, which must hold no secrets."""
    about = read_about(run_dir) or About()
    base = str(about.student or settings["student"]["model"])
    lines = [*_front_matter(base, adapter), f"# {run_dir.name}", ""]
    what = "LoRA adapter of" if adapter else "model made from"
    how = "trained on its own answers by a reward."
    if about.teacher:
        how = (
            f"trained by {METHOD} with `{about.teacher}` as its teacher: the student sampled answers, and the teacher scored every token "
            "of them."
        )
    lines += [f"This is a {what} `{base}`, {how}" + (f" Its weights are saved in {dtype}." if dtype else ""), ""]
    lines += _result(summary) + _load(adapter, base) + _training(about) + _recipe(settings)
    return "\n".join(lines)


def _front_matter(base: str, adapter: bool) -> list[str]:
    values: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if base and not Path(base).exists() and base.count("/") == 1:  # the hub refuses what is no name of its own
        values["base_model"] = base
    values["tags"] = ["opd", "on-policy-distillation", "distillation", *(["lora"] if adapter else [])]
    return ["---", *yaml.safe_dump(values, sort_keys=False).rstrip().split("\n"), "---", ""]


def _result(summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return ["## Result", "", "The run was not evaluated.", ""]
    titles, rows = summary_cells(summary_rows(summary))
    lines = [_row(titles), _row(["---"] * len(titles)), *map(_row, rows), ""]
    notes = [f"- {note}" for note in summary_notes(summary)]
    return [
        "## Result",
        "",
        *lines,
        "Brackets are 95% intervals over the held-out prompts.",
        "",
        *notes,
        *([""] if notes else []),
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _load(adapter: bool, base: str) -> list[str]:
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model, tokenizer = (kind.from_pretrained("PATH") for kind in (AutoModelForCausalLM, AutoTokenizer))',
    ]
    if adapter:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            f'model = AutoPeftModelForCausalLM.from_pretrained("PATH")  # and {base}',
        ]
    return ["## Use", "", "```python", *load, "```", ""]


def _training(about: About) -> list[str]:
    facts = {
        "objective": about.objective,
        "data": about.data,
        "started": moment(about.started) if about.started else "",
        "hardware": about.hardware or about.device,
        "versions": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
        "commit": about.commit,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    if about.command:
        lines += ["", "```", about.command, "```"]
    return ["## Training", "", *lines, ""]


def _recipe(settings: Mapping[str, Any]) -> list[str]:
    """The keys that differ from the defaults."""
    keys = {found.key: found.value for found in changed_keys(settings)}
    named = {
        f"teacher.{key}": value
        for key, value in (settings.get("teacher") or {}).items()
        if key in ("model", "url") and value
    }
    lines = [f"{key}: {value}" for key, value in {**named, **keys}.items()]
    return ["## Recipe", "", "Keys that differ from the defaults:", "", "```yaml", *lines, "```", ""]
