"""Prometheus metrics of the queues. There is no label for clients, who are many and have a right to privacy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .fair_queue import FairQueue


class QueueCollector(Collector):
    """Reads the queues when metrics are collected."""

    def __init__(self, queues: Sequence[FairQueue], model_name: str) -> None:
        self._queues, self._model = queues, model_name

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "queue"]
        waiting = GaugeMetricFamily("dso:queue_waiting", "Jobs that have not started.", labels=labels)
        running = GaugeMetricFamily("dso:queue_running", "Jobs that are running.", labels=labels)
        waited = CounterMetricFamily("dso:queue_wait_seconds", "Seconds that jobs waited for their turn.", labels=labels)
        ran = CounterMetricFamily("dso:queue_run_seconds", "Seconds that jobs ran.", labels=labels)
        jobs = CounterMetricFamily("dso:queue_jobs", "Jobs by outcome.", labels=[*labels, "outcome"])
        for queue in self._queues:
            names = [self._model, queue.name]
            waiting.add_metric(names, queue.waiting)
            running.add_metric(names, queue.running)
            waited.add_metric(names, queue.counts.waited)
            ran.add_metric(names, queue.counts.ran)
            for outcome in ("done", "refused", "late", "left"):
                jobs.add_metric([*names, outcome], queue.counts.jobs[outcome])
        yield from (waiting, running, waited, ran, jobs)
