"""Result sheet of a part: one row per case, a clock, and errors that end a case but not the part."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import lacks, missing
from benchmarks.gpu.results import Row, Verdict, append_row

Cells = Mapping[str, Any]


class CheckFailed(Exception):
    """A check that did not hold. `cells` are what was measured all the same."""

    def __init__(self, note: str, cells: Cells | None = None) -> None:
        super().__init__(note)
        self.cells = dict(cells or {})


@dataclass(kw_only=True)
class Sheet:
    """One part's way to say what it found."""

    part: str
    rows: Path
    device: torch.device
    rehearse: bool
    deadline: float
    """On `time.monotonic`."""
    models: Path | None = None
    """Run folder of `opd demo` whose models and prompts are taken."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def case(
        self,
        table: str,
        case: str,
        measure: Callable[[], Cells],
        *,
        seconds: float = 3.0,
        needs: tuple[str, ...] = (),
        judged: bool = False,
    ) -> Cells | None:
        """Run one case and write its row. None where it did not come to an end.

        A case begins only with `seconds` left. `judged` says that coming back without CheckFailed means "ok".
        Running out of memory is a measurement; every other error is a failure, and its traceback goes to the log.
        """
        lacking = missing(needs)
        if lacking:
            self._row(table, case, "skipped", note=lacks(lacking))
            return None
        if self.left < seconds:
            self._row(table, case, "not reached", note="the time of this part was over.")
            return None
        began = time.monotonic()
        try:
            cells = measure()
        except CheckFailed as failure:
            self._row(table, case, "FAIL", failure.cells, str(failure), began)
            return None
        except torch.cuda.OutOfMemoryError as error:
            self._row(table, case, "", {"note": "out of memory"}, str(error).split(". ")[0], began)
            return None
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self._row(table, case, "FAIL", {}, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", began)
            return None
        finally:
            self.clear()
        self._row(table, case, "ok" if judged else "", cells, "", began)
        return cells

    def write(self, table: str, case: str, cells: Cells) -> None:
        """One row of what has been measured already."""
        self._row(table, case, "", cells)

    def clear(self) -> None:
        """Give memory back between cases."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _row(
        self,
        table: str,
        case: str,
        verdict: Verdict,
        cells: Cells | None = None,
        note: str = "",
        began: float | None = None,
    ) -> None:
        seconds = 0.0 if began is None else time.monotonic() - began
        row = Row(
            part=self.part, table=table, case=case, verdict=verdict, cells=dict(cells or {}), note=note, seconds=seconds
        )
        append_row(self.rows, row)
        print(f"{seconds:6.1f} s  {table}: {case} {verdict} {note}", flush=True)
