"""What a run leaves behind: its records, its progress display, its summary, its report. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.reporting.intervals import mean_interval, wilson_interval
    from opd.reporting.progress import Progress
    from opd.reporting.record import MetricsRecord, RunRecorder, SampleRecord, read_metrics, read_samples
    from opd.reporting.report import write_report
    from opd.reporting.sinks import TensorBoardSink, WandbSink, open_sinks
    from opd.reporting.summary import (
        SummaryRow,
        read_summary,
        summary_rows,
        summary_table,
        summary_text,
        write_summary,
    )

_MODULE_OF = {
    "mean_interval": "intervals",
    "wilson_interval": "intervals",
    "Progress": "progress",
    "MetricsRecord": "record",
    "RunRecorder": "record",
    "SampleRecord": "record",
    "read_metrics": "record",
    "read_samples": "record",
    "write_report": "report",
    "TensorBoardSink": "sinks",
    "WandbSink": "sinks",
    "open_sinks": "sinks",
    "SummaryRow": "summary",
    "read_summary": "summary",
    "summary_rows": "summary",
    "summary_table": "summary",
    "summary_text": "summary",
    "write_summary": "summary",
}

__all__ = [
    "MetricsRecord",
    "Progress",
    "RunRecorder",
    "SampleRecord",
    "SummaryRow",
    "TensorBoardSink",
    "WandbSink",
    "mean_interval",
    "open_sinks",
    "read_metrics",
    "read_samples",
    "read_summary",
    "summary_rows",
    "summary_table",
    "summary_text",
    "wilson_interval",
    "write_report",
    "write_summary",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'opd.reporting' has no attribute {name!r}")
    return getattr(import_module(f"opd.reporting.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
