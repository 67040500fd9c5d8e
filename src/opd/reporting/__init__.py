"""Records, progress display, summary and report of a run. The metric sinks are imported when they are used."""

from __future__ import annotations

from opd.reporting.intervals import mean_interval, wilson_interval
from opd.reporting.progress import Progress
from opd.reporting.record import MetricsRecord, RunRecorder, SampleRecord, read_metrics, read_samples
from opd.reporting.report import write_report
from opd.reporting.sinks import TensorBoardSink, WandbSink, open_sinks
from opd.reporting.summary import SummaryRow, read_summary, summary_rows, summary_table, summary_text, write_summary

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
