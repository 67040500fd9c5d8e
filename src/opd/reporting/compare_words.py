"""The numbers of a comparison as words, and its tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from opd.errors import printable
from opd.reporting import summary
from opd.reporting.compare import Comparison
from opd.reporting.differences import Difference, metric_title
from opd.reporting.summary import NO_VALUE, PLAIN_WIDTH, Interval, number, share, with_interval

MINUS = "−"
OVER_SEEDS = "Brackets: 95% intervals; where a group has several seeds, t intervals of the mean over its seeds."
OVER_PROMPTS = "Brackets: 95% intervals over the held-out prompts."


def signed(difference: Difference) -> str:
    """+12.3 [+4.1, +20.5] points of accuracy, or −0.031 [−0.040, −0.022] nats of reverse KL."""

    def show(value: float) -> str:
        return f"{100 * value:+.1f}" if difference.metric.startswith("accuracy") else f"{value:+#.3g}"

    return with_interval(difference.value, difference.interval, show).replace("-", MINUS)


def unit(metric: str) -> str:
    """The unit of a difference of the metric."""
    return "points" if metric.startswith("accuracy") else "nats"


def count(value: float | None) -> str:
    """987, 12.3 k, 4.56 M"""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    size, letter = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if abs(value) >= s), (1.0, ""))
    return f"{value / size:.3g}{letter}" if letter else f"{value:.0f}"


def clock(seconds: float | None) -> str:
    """42 s, 12 min 05 s, 3 h 07 min"""
    if seconds is None or not math.isfinite(seconds):
        return NO_VALUE
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    return f"{minutes} min {second:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def result_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells; a column that no group fills is left out."""
    rows = comparison.results
    names = list(dict.fromkeys(name for row in rows for name in row.metric))
    columns = [("steps", [row.steps for row in rows]), ("state", [row.status for row in rows])]
    columns += [("accuracy before", [_shown(row.before, row.before_interval, "accuracy") for row in rows])]
    for name in names:
        title = {"accuracy": "accuracy after", "reverse_kl": "reverse KL (nats)"}.get(name, metric_title(name))
        columns.append((title, [_shown(row.metric.get(name), row.interval.get(name), name) for row in rows]))
    columns += [("tokens", [count(row.tokens) for row in rows]), ("time", [clock(row.seconds) for row in rows])]
    filled = [(title, cells) for title, cells in columns if any(cell != NO_VALUE for cell in cells)]
    if all(row.status == "finished" for row in rows):
        filled = [column for column in filled if column[0] != "state"]
    return [title for title, _ in filled], [[cells[i] for _, cells in filled] for i in range(len(rows))]


def intervals_are_over(comparison: Comparison) -> str:
    return OVER_SEEDS if any(group.is_many for group in comparison.groups) else OVER_PROMPTS


def versus(difference: Difference) -> str:
    """B − A"""
    return f"{difference.other.mark} {MINUS} {difference.base.mark}"


def paired_over(difference: Difference) -> str:
    """The cell that says over what the interval is."""
    if difference.value is None:
        return "not comparable"
    if difference.interval is None:
        return "no interval"
    return f"paired, {difference.pairs}" if difference.pairs else "unpaired"


def terminal(comparison: Comparison, width: int) -> Group:
    """The tables and notes for rich, in `width` columns. Names are text, never markup."""
    parts: list[RenderableType] = [_result(comparison, width), Text(intervals_are_over(comparison), style="dim")]
    if comparison.differences:
        table = _table("Differences", ["", "metric", "difference", "interval"], right_from=2)
        for found in comparison.differences:
            amount = signed(found) if found.value is None else f"{signed(found)} {unit(found.metric)}"
            table.add_row(*map(_text, [versus(found), metric_title(found.metric), amount, paired_over(found)]))
        parts += ["", table]
    if comparison.recipe:
        table = _table("Recipes: keys that differ", ["", *(group.mark for group in comparison.groups)], right_from=99)
        for row in comparison.recipe:
            cells = [f"{v} (default)" if is_it else v for v, is_it in zip(row.values, row.are_default, strict=True)]
            table.add_row(*map(_text, [row.key, *cells]))
        parts += ["", table]
    parts += [_text(f"note: {note}") for note in [*comparison.notes, *explained(comparison)]]
    return Group(*parts)


def _result(comparison: Comparison, width: int) -> Table:
    """A row for each group, or, where that is too wide, a column."""
    titles, cells = result_cells(comparison)
    table = _table("Result", ["", "run", *titles], right_from=2)
    for group, row in zip(comparison.groups, cells, strict=True):
        table.add_row(*map(_text, [group.mark, group.title, *row]))
    wide = Console(width=10**4)
    if Measurement.get(wide, wide.options, table).maximum <= width:
        return table
    table = _table("Result", ["", *(f"{group.mark} {group.title}" for group in comparison.groups)], right_from=1)
    for title, row in zip(titles, zip(*cells, strict=True), strict=True):
        table.add_row(*map(_text, [title, *row]))
    return table


def explained(comparison: Comparison) -> list[str]:
    """What the intervals of the differences stand on, once each, with the pairs that it is true of."""
    by_note: dict[str, dict[str, None]] = {}
    for found in comparison.differences:
        if found.value is not None and found.note:
            by_note.setdefault(found.note, {})[versus(found)] = None
    return [f"{', '.join(pairs)}: {note}" for note, pairs in by_note.items()]


def plain_text(comparison: Comparison) -> str:
    """The same for logs and pipes."""
    return summary.plain_text(terminal(comparison, PLAIN_WIDTH))


def _text(words: str) -> Text:
    """Never markup, and nothing in it moves the cursor."""
    return Text(printable(words))


def _table(title: str, columns: Sequence[str], right_from: int) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        # Folded, never cut: a number without its end is another number.
        side = "right" if index >= right_from else "left"
        table.add_column(_text(name), justify=side, no_wrap=index == 0, overflow="fold")
    return table


def _shown(value: float | None, interval: Interval | None, metric: str) -> str:
    show = share if metric.startswith("accuracy") else number
    return show(value, interval).replace("-", MINUS)
