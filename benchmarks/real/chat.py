"""General prompts: every form with every topic. Prompts to tune on and held-out prompts have topics of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

FORMS = (
    "Explain to a child what {} means.",
    "Write two sentences about {}.",
    "What should I know before I start with {}?",
    "Give me three tips about {}.",
    "I have never heard of {}. Can you tell me the basics?",
    "Why do people care about {}?",
    "Write a short letter to a friend about {}.",
    "What is a common mistake with {}?",
    "Tell me a short story about {}.",
    "How would you teach {} in one hour?",
    "What are good and bad sides of {}?",
    "Ask me a question about {}, then answer it yourself.",
    "Which book or film would you choose to learn about {}?",
    "Summarise {} in a few words.",
)
TOPICS = (
    "baking bread", "the phases of the moon", "learning a language", "keeping a diary", "cycling to work", "the water cycle",
    "growing tomatoes", "saving money", "playing chess", "how a bill becomes law", "sleeping well", "photosynthesis", "moving to a new city",
    "painting with watercolours", "earthquakes", "making a budget", "training a puppy", "the Roman Empire", "writing a poem",
    "renewable energy", "a job interview", "folding paper animals", "volcanoes", "cooking for guests", "the human heart", "map reading",
    "running a marathon", "recycling", "how bees make honey", "public speaking", "fixing a flat tyre", "the invention of printing",
)  # fmt: skip
HELD_OUT_TOPICS = (
    "knitting a scarf", "black holes", "planning a picnic", "the history of coffee", "learning to swim", "good table manners",
    "how vaccines work", "building a sandcastle", "first aid", "the rules of football", "composting", "taking photographs at night",
)  # fmt: skip
TUNING_TOPICS = (
    "steel bridges",
    "penguins",
    "playing the violin",
    "deserts",
    "wool",
    "castles",
    "a good breakfast",
    "the tides",
)
HELD_OUT = 48
HELD_OUT_SEED = 2_000_003
"""The same held-out prompts for every seed of training."""


def training() -> list[str]:
    """All prompts to train on, in the order of forms."""
    return [form.format(topic) for form in FORMS for topic in TOPICS]


def tuning() -> list[str]:
    """Prompts that choose a rate."""
    return [form.format(topic) for form in FORMS for topic in TUNING_TOPICS]


def held_out(count: int = HELD_OUT) -> list[str]:
    """Prompts about topics that training never has."""
    everything = [form.format(topic) for form in FORMS for topic in HELD_OUT_TOPICS]
    return random.Random(HELD_OUT_SEED).sample(everything, count)


def messages(text: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": text}]


def write(path: Path, texts: Sequence[str], **columns: str) -> None:
    """JSONL that `opd train` and `opd eval` read; `columns` are the same in every row."""
    lines = [json.dumps({"prompt": messages(text), **columns}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
