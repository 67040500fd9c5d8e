"""General chat prompts, each of a topic and an instruction. Topics of training, tuning and measuring are apart."""

from __future__ import annotations

from typing import Any

INSTRUCTIONS = (
    "Explain {} to a child.",
    "Give me three facts about {}.",
    "Write a short poem about {}.",
    "What should a beginner know about {}?",
    "Why do people care about {}?",
    "Write the first lines of a story about {}.",
    "What are common mistakes that people make with {}?",
    "Summarize the history of {} in two sentences.",
)
TOPICS = {
    "training": """
        bread, bicycles, the moon, volcanoes, tea, chess, gardening, the piano, whales, rivers, snow, elections, maps, sleep, honey, bridges,
        money, friendship, swimming, libraries, robots, cheese, the Roman Empire, vaccines, photography, wind power, dinosaurs, running, glass,
        spices, trains, the ocean, painting, ants, soap, novels, clocks, mountains, salt, dancing, recycling, birds, fire, languages, cotton,
        football, satellites, forests, cooking rice, job interviews
    """,
    "tuning": "steel, penguins, tourism, violins, deserts, coffee, public speaking, bees",
    "held_out": """
        lighthouses, potatoes, kites, earthquakes, the guitar, camels, newspapers, solar panels, wool, marathons, chocolate, castles, octopuses,
        saving money, airports, the stars
    """,
}


def chats(part: str) -> list[dict[str, Any]]:
    """The prompts of a part of TOPICS, as rows that opd reads."""
    topics = [topic.strip() for topic in TOPICS[part].split(",")]
    texts = [instruction.format(topic) for topic in topics for instruction in INSTRUCTIONS]
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]
