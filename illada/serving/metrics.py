"""What `/metrics` says of the server, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one server. Reading them asks the worker for numbers, and never for the model."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()
        self.registry.register(_WorkerNumbers(worker))
        common = {"registry": self.registry}
        self.requests = Counter("illada_requests", "Answered requests", ["endpoint", "status"], **common)
        self.seconds = Histogram(
            "illada_request_seconds",
            "From a request to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            **common,
        )
        self.first_text_seconds = Histogram(
            "illada_first_text_seconds", "From a request to its first settled text", buckets=_SECONDS, **common
        )
        self.prompt_tokens = Counter("illada_prompt_tokens", "Tokens of answered prompts", **common)
        self.written_tokens = Counter("illada_written_tokens", "Tokens that were written", **common)
        self.tokens_per_forward = Histogram(
            "illada_tokens_per_forward",
            "Tokens written per forward pass, of each answer",
            buckets=(0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32),
            **common,
        )

    def count_answer(self, prompt_tokens: int, written_tokens: int, num_passes: int):
        """Counts a finished answer."""
        self.prompt_tokens.inc(prompt_tokens)
        self.written_tokens.inc(written_tokens)
        if num_passes:
            self.tokens_per_forward.observe(written_tokens / num_passes)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _WorkerNumbers:
    """What the worker counts itself, read when the page is asked for."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def collect(self) -> Iterator[Metric]:
        engine, manager = self.worker.manager.engine, self.worker.manager
        yield GaugeMetricFamily("illada_requests_waiting", "Texts that wait for a row", value=manager.num_waiting)
        yield GaugeMetricFamily("illada_rows_in_use", "Texts that are being written", value=len(engine.active))
        yield GaugeMetricFamily("illada_rows", "Texts that may be written at a time", value=self.worker.max_rows)
        yield CounterMetricFamily("illada_passes", "Passes of the engine", value=engine.num_passes)
        yield CounterMetricFamily("illada_row_passes", "Rows that took part in passes", value=engine.num_row_passes)
