"""Held-out chat prompts with a constraint that code can check: eleven kinds, about topics that training never has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_NEW_TOKENS = 64
Check = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A prompt and the constraint that its answer must meet."""

    kind: str
    prompt: str
    check: Check

    def satisfied(self, answer: str, *, finished: bool) -> bool:
        """An empty answer, and one that was cut off, meet nothing."""
        text = answer.strip()
        return finished and bool(text) and self.check(text)


def words(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes."""
    return re.findall(r"[A-Za-z0-9'’]+", text)


def _exactly(count: int) -> Check:
    return lambda text: len(words(text)) == count


def _at_most(count: int) -> Check:
    return lambda text: 2 <= len(words(text)) <= count  # one word alone is no answer to these questions


def _contains(keyword: str) -> Check:
    return lambda text: keyword in [word.lower() for word in words(text)] and len(words(text)) >= 3


def _sentence_of(test: Callable[[str], bool]) -> Check:
    return lambda text: len(words(text)) >= 3 and test(text)


def _numbered(count: int) -> Check:
    def check(text: str) -> bool:
        numbers = [found.group(1) for line in text.splitlines() if (found := re.match(r"\s*(\d+)[.)]\s*\S", line))]
        return numbers == [str(n) for n in range(1, count + 1)]

    return check


def _ends(phrase: str) -> Check:
    return lambda text: text.lower().rstrip(" .!\"'”’*").endswith(phrase) and len(words(text)) >= len(words(phrase)) + 3


def _begins(word: str) -> Check:
    return lambda text: words(text)[:1] == [word] and len(words(text)) >= 3


def _either(right: str, wrong: str) -> Check:
    """The first word decides, and the other one is nowhere."""
    return lambda text: (
        words(text)[:1] != [] and words(text)[0].lower() == right and wrong not in map(str.lower, words(text))
    )


def _says(answer: str) -> Check:
    return lambda text: answer in [word.lower() for word in words(text)]


def _kinds() -> Iterator[tuple[str, str, Check]]:
    for thing in ("a colour", "a fruit", "an animal", "a country"):
        yield "one word", f"Name {thing}. Answer with exactly one word.", _exactly(1)
    for topic in ("composting", "first aid", "a vaccine", "a picnic"):
        yield "at most 20 words", f"What is {topic}? Answer in at most 20 words.", _at_most(20)
    for topic, keyword in (
        ("coffee", "morning"),
        ("football", "team"),
        ("swimming", "water"),
        ("a sandcastle", "beach"),
    ):
        yield "keyword", f"Write one sentence about {topic} that contains the word '{keyword}'.", _contains(keyword)
    for topic in ("a black hole", "a scarf", "a camera", "a picnic"):
        prompt = f"Describe {topic} in one sentence. Use lower case letters only."
        yield "lower case", prompt, _sentence_of(lambda text: text == text.lower())
    for things in ("vegetables", "sports", "musical instruments", "things to take to a picnic"):
        yield (
            "numbered lines",
            f"List 3 {things}, one per line, numbered 1., 2. and 3. Write nothing else.",
            _numbered(3),
        )
    for topic, phrase in (
        ("knitting", "that is all"),
        ("coffee", "thank you"),
        ("football", "the end"),
        ("swimming", "good luck"),
    ):
        yield (
            "ending",
            f"Write one sentence about {topic} and end your answer with the words '{phrase}'.",
            _ends(phrase),
        )
    for question, right in (
        ("Is ice cold?", "yes"),
        ("Can a stone swim?", "no"),
        ("Do birds have wings?", "yes"),
        ("Is the sun a fruit?", "no"),
    ):
        yield "yes or no", f"{question} Answer yes or no.", _either(right, "no" if right == "yes" else "yes")
    for word, topic in (("Today", "football"), ("Every", "knitting"), ("Most", "coffee"), ("When", "swimming")):
        yield "beginning", f"Write one sentence about {topic} that begins with the word '{word}'.", _begins(word)
    for topic in ("a black hole", "knitting", "a camera", "table manners"):
        prompt = f"Write one short sentence about {topic} without any comma."
        yield "no comma", prompt, _sentence_of(lambda text: "," not in text)
    for question, answer in (
        ("What is the capital of Italy?", "rome"),
        ("Which animal barks?", "dog"),
        ("What colour is snow?", "white"),
        ("How many legs has a spider?", "eight"),
    ):
        yield "short fact", f"{question} Answer in one sentence.", _says(answer)


INSTRUCTIONS = tuple(Instruction(kind=kind, prompt=prompt, check=check) for kind, prompt, check in _kinds())
