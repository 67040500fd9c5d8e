"""The six names of the on-policy distillation concept for verl, and the recipe's keys that they stand for.

They are a contract with configs written for that concept. The plugin and the patch accept them beside the recipe's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd.errors import ConfigError

LOSS_MODE = "on_policy_distillation"
"""The value of the sixth name, `loss_mode` (in a plain dict also `policy_loss`), in `actor_rollout_ref.actor.policy_loss`."""


@dataclass(frozen=True, kw_only=True)
class ConceptName:
    """One name and the keys of a recipe that take its value."""

    name: str
    keys: tuple[str, ...]
    values: Mapping[str, str] = field(default_factory=dict)
    """The recipe's value for each value of the concept. Empty: the values are the same."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """An explanation for the log, by value."""


GKD = (
    "gkd is KL(student ‖ beta·teacher + (1−beta)·student), which is divergence=skew_reverse_kl; the divergence of the GKD paper "
    "(arXiv 2306.13649) is divergence=generalized_jsd"
)
CONCEPT_NAMES = (
    ConceptName(
        name="distillation_type",
        keys=("objective.divergence",),
        values={
            "reverse_kl": "reverse_kl",
            "forward_kl": "forward_kl",
            "gkd": "skew_reverse_kl",
            "generalized_jsd": "generalized_jsd",
        },
        notes={"gkd": GKD},
    ),
    ConceptName(
        name="distillation_temperature", keys=("objective.student_temperature", "objective.teacher_temperature")
    ),
    ConceptName(name="distillation_beta", keys=("objective.beta",)),
    ConceptName(name="hybrid_lambda_rl", keys=("rl.weight",)),
    ConceptName(name="hybrid_lambda_distill", keys=("rl.distill_weight",)),
)


def apply_concept_names(
    section: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section with recipe keys in place of the concept's names, and a line for the log for each of them.

    `section` has nested mappings; None means that a name is not given. `defaults` holds the value of a dotted key that counts as not
    given. `prefix` is the section's place in the config. Raises ConfigError for an unknown value, and for a key that is given twice.
    """
    known = {one.name for one in CONCEPT_NAMES}
    result = {
        str(key): dict(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if key not in known
    }
    notes: list[str] = []
    for one in CONCEPT_NAMES:
        value = section.get(one.name)
        if value is None:
            continue
        if one.values and value not in one.values:
            raise ConfigError(
                f"{prefix}{one.name}={value!r} is not one of {', '.join(one.values)}; {prefix}{one.keys[0]} has more to choose from."
            )
        new = one.values.get(value, value) if one.values else value
        for dotted in one.keys:
            group, _, key = dotted.partition(".")
            keys = result.setdefault(group, {})
            given = keys.get(key)
            if given is not None and given not in (defaults.get(dotted), new):
                raise ConfigError(
                    f"{prefix}{one.name}={value} means {prefix}{dotted}={new}, but {prefix}{dotted}={given} is set too; drop one of them."
                )
            keys[key] = new
        explained = f": {one.notes[value]}." if value in one.notes else "."
        notes.append(f"{one.name}={value} was read as {', '.join(f'{key}={new}' for key in one.keys)}{explained}")
    return result, tuple(notes)
