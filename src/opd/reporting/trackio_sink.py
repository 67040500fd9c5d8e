"""Metric sink for Trackio, which keeps a project on this disk: `trackio show --project NAME` opens it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from opd.reporting.record import SampleRecord, Who
from opd.reporting.sample_tables import COLUMNS, SampleTables
from opd.reporting.sinks import evaluation_names, finite, missing_sink


class TrackioSink:
    """Logs to a run of a Trackio project; a resumed run goes on under the same name. It repeats the steps since the last checkpoint."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None,
        project: str = "opd",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_sink("trackio") from error
        with redirect_stdout(StringIO()):  # it greets with several lines
            self._run: Any = trackio.init(
                project=project,
                name=Path(run_dir).resolve().name,
                config=dict(config or {}),
                resume="never" if resume_step is None else "allow",
                embed=False,
                auto_log_cpu=False,
            )
        self._table: Any = trackio.Table
        self._finish: Any = trackio.finish  # unlike the run's own, it leaves nothing to say at exit
        self._tables = SampleTables()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(finite(metrics), step=step)

    def evaluation(self, step: int, who: Who, metrics: Mapping[str, float]) -> None:
        self._run.log(finite(evaluation_names(who, metrics)), step=step)

    def sample(self, record: SampleRecord) -> None:
        self._log(self._tables.add(record))

    def close(self) -> None:
        self._log(self._tables.take())
        with redirect_stdout(StringIO()):
            self._finish()

    def _log(self, tables: Mapping[tuple[str, int], list[list[Any]]]) -> None:
        for (name, step), rows in tables.items():
            self._run.log({name: self._table(columns=list(COLUMNS), data=rows)}, step=step)
