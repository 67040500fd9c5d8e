"""Where a response ends. One rule for every engine, so that the same ids make the same rollout."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence

from opd.data.rendering import Renderer


def response_end(
    response: Sequence[int], *, eos_ids: Collection[int], stop: Sequence[str], renderer: Renderer
) -> tuple[int, bool]:
    """Length of the response, its EOS included, and whether it ended by itself. What an engine put behind the first EOS is padding
    whatever its id, so pad == eos cannot hide an EOS."""

    def stopped(end: int) -> bool:
        text = renderer.decode(response[:end])
        return any(s in text for s in stop)

    length = next((t + 1 for t, token in enumerate(response) if token in eos_ids), None)
    finished = length is not None
    length = len(response) if length is None else length
    if stop and stopped(length):
        return bisect.bisect_left(range(1, length + 1), True, key=stopped) + 1, True
    return length, finished
