"""What one of several ranks draws of a step's prompts."""

from __future__ import annotations

from opd.ranks import Ranks


def parts_of(rows: int, batch_size: int, ranks: Ranks) -> list[range]:
    """Rows of `rows` prompts that this rank draws, at most `batch_size` at once: whole batches in turn; those that are left, fewer than
    there are ranks, are divided."""
    batches = [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    whole = len(batches) // ranks.world * ranks.world
    parts = batches[ranks.rank : whole : ranks.world]
    for batch in batches[whole:]:
        start, stop = (batch.start + len(batch) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
        parts += [range(start, stop)] if start < stop else []
    return parts
