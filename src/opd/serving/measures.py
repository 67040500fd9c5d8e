"""What GET /metrics shows, in Prometheus's format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class Measures:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("opd_requests", "Requests answered.", labels, registry=self.registry)
        self.refusals = Counter("opd_refusals", "Requests refused, by reason.", ("reason",), registry=self.registry)
        self.rows = Counter("opd_rows", "Rows read.", registry=self.registry)
        self.tokens = Counter("opd_tokens", "Tokens read, without padding.", registry=self.registry)
        self.gone = Counter("opd_clients_gone", "Requests whose client left before its answer.", registry=self.registry)
        self.queue_rows = Gauge("opd_queue_rows", "Rows that wait to be read.", registry=self.registry)
        self.queue_tokens = Gauge("opd_queue_tokens", "Tokens of all open requests.", registry=self.registry)
        self.forward_seconds = Histogram(
            "opd_forward_seconds", "Seconds of a forward pass.", registry=self.registry, buckets=SECONDS
        )

    def forward(self, seconds: float, rows: int, tokens: int) -> None:
        """Count one forward pass."""
        self.forward_seconds.observe(seconds)
        self.rows.inc(rows)
        self.tokens.inc(tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
