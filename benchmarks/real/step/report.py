"""The page: a function of the CSV and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks import markdown
from benchmarks.real.step.roofline import limits
from benchmarks.rows import Row

PHASES = ("rollout", "teacher", "update")
RATES = ("float32_rate", "bfloat16_rate", "read_rate")
WORK = ("prefill", "decode", "decode_bytes", "teacher", "update", "update_bytes")
OPD, TRL, TRL_PARTS = "opd", "TRL", "TRL, 8 rows at a time"
DTYPES = {"float32": "float32", "bfloat16": "bfloat16 autocast"}
SIZES = ("threads", "steps", "prompts", "max_new_tokens")
"""Settings that all runs of a page share."""


def page(rows: Sequence[Row]) -> str:
    """Markdown of all runs: times and memory, where the machine's limit is, and whether the work was the same."""
    first = rows[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] != '1' else ''}"
    cases = [(dtype, trainer) for dtype in DTYPES for trainer in dict.fromkeys(r["trainer"] for r in rows)]
    groups = {case: [r for r in rows if (r["dtype"], r["trainer"]) == case] for case in cases}
    groups = {case: mine for case, mine in groups.items() if mine}
    parts = [
        "# A training step of a real model: opd and TRL's DistillationTrainer",
        f"`python -m benchmarks real_step`: the teacher is SmolLM2-135M-Instruct, the student is the same with Gaussian noise of 8 % of each "
        f"matrix's standard deviation. {first['prompts']} prompts × at most {first['max_new_tokens']} new tokens a step, reverse KL over the "
        f"whole vocabulary at temperature 1, AdamW, weights in float32, {threads}. {_versions(rows)}.",
        f"Each run is a process of its own, the trainers in turn. Its times are medians over its timed steps ({first['steps']}, after a first one). Of the runs, "
        "median, lowest and highest in brackets. Peak memory is the process's largest resident size, loading included.",
        _times(groups),
        "\n".join(_ratios(groups)),
        "`update` is everything but rollouts and the teacher's layers, in both trainers: the teacher's output layer runs with the loss. "
        f"'{TRL_PARTS}' is TRL with gradient accumulation, which saves memory; '{TRL}' passes a step's rollouts at once. opd is at its defaults.",
        "## How near the machine's limit",
        "The limit is the time that the phase's products take at the rate of one product of 2048 rows, in the dtype that its layers multiply in, plus "
        "reading: the weights for each decoded token where that takes longer than its products, AdamW's arrays in the update. Work counts no "
        "padding, and attention counts whole squares.",
        _rates(rows),
        _limits(rows, groups),
        "## The same work",
        _work(groups),
        "Prompt ids and their order are identical. `difference`: on the hidden states of TRL's first forward pass, TRL's loss less opd's reverse KL "
        "in float64, nats per token. `layers in`: the dtype of the layers' products, by phase. First losses are of different samples from the same weights.",
    ]
    return "\n\n".join(parts) + "\n"


def _times(groups: dict[tuple[str, str], list[Row]]) -> str:
    head = [
        "dtype",
        "trainer",
        "runs",
        "s/step",
        *(f"{p} s" for p in PHASES),
        "CPU s/step",
        "response tokens/s",
        "peak GiB",
    ]
    lines = []
    for (dtype, trainer), mine in groups.items():
        phases = [f"{_median(mine, f'{p}_seconds'):.2f}" for p in PHASES]
        whole = [_spread(mine, name) for name in ("cpu_seconds", "tokens_per_second", "peak_gib")]
        lines.append([DTYPES[dtype], trainer, str(len(mine)), _spread(mine, "seconds"), *phases, *whole])
    return markdown.table(head, lines)


def _ratios(groups: dict[tuple[str, str], list[Row]]) -> list[str]:
    """TRL over opd, by dtype."""
    lines = []
    for (dtype, trainer), theirs in groups.items():
        ours = groups.get((dtype, OPD))
        if trainer == OPD or not ours:
            continue
        speed, memory = (_median(ours, n) / _median(theirs, n) for n in ("tokens_per_second", "peak_gib"))
        lines.append(
            f"- {DTYPES[dtype]}: opd trains on {speed:.2f} times the response tokens per second of '{trainer}', at {memory:.2f} of its peak memory."
        )
    return lines


def _rates(rows: Sequence[Row]) -> str:
    float32, bfloat16, read = (_spread(rows, name, 1e9) for name in RATES)
    return f"Rates of this machine: {float32} GFLOP/s in float32, {bfloat16} GFLOP/s in bfloat16, reading {read} GB/s."


def _limits(rows: Sequence[Row], groups: dict[tuple[str, str], list[Row]]) -> str:
    lines = []
    for (dtype, trainer), mine in groups.items():
        kinds = dict(item.split("=") for item in mine[0]["products"].split())
        rates = {phase: _median(rows, f"{kinds[phase]}_rate") for phase in PHASES}
        least = limits({name: _median(mine, name) for name in WORK}, rates, _median(rows, "read_rate"))
        for phase in PHASES:
            operations = sum(_median(mine, n) for n in (("prefill", "decode") if phase == "rollout" else (phase,)))
            took = _median(mine, f"{phase}_seconds")
            numbers = (f"{operations / 1e12:.3g}", f"{least[phase]:.2f}", f"{took:.2f}", f"{least[phase] / took:.0%}")
            lines.append([DTYPES[dtype], trainer, phase, kinds[phase], *numbers])
    head = ["dtype", "trainer", "phase", "layers in", "TFLOP", "limit s", "took s", "limit / took"]
    return markdown.table(head, lines)


def _work(groups: dict[tuple[str, str], list[Row]]) -> str:
    lines = []
    for (dtype, trainer), mine in groups.items():
        differences = [abs(float(r["difference"])) for r in mine if r["difference"]]
        worst = f"{max(differences):.1g}" if differences else ""
        products = "; ".join(sorted({r["products"] for r in mine}))
        tokens = (f"{_median(mine, 'prompt_tokens'):.0f}", _spread(mine, "response_tokens"))
        lines.append([DTYPES[dtype], trainer, *tokens, _spread(mine, "first_loss"), worst, products])
    head = ["dtype", "trainer", "prompt tokens/step", "response tokens/step", "first loss", "difference", "layers in"]
    return markdown.table(head, lines)


def _versions(rows: Sequence[Row]) -> str:
    found = dict(item.split("=") for r in rows for item in r["versions"].split())
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _median(rows: Sequence[Row], name: str) -> float:
    return median(float(r[name]) for r in rows)


def _spread(rows: Sequence[Row], name: str, unit: float = 1.0) -> str:
    values = [float(r[name]) / unit for r in rows]
    return f"{_number(median(values))} [{_number(min(values))}, {_number(max(values))}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
