"""Prometheus metrics of a pool: those of the loaded models' engines, which have a label for the model, and its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..http.queue_metrics import QueueCollector
from .model_pool import ModelPool
from .pooled_model import Status


class PoolCollector(Collector):
    """Reads the pool when metrics are collected. Metrics of several engines with the same name become one with the samples of
    all; those of a model that is unloaded disappear."""

    def __init__(self, pool: ModelPool) -> None:
        self._pool = pool

    def describe(self) -> list[Metric]:
        """No metrics, so that registering collects nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = GaugeMetricFamily("dso:model_status", "1 for the status that a model has.", labels=["model_name", "status"])
        memory = GaugeMetricFamily("dso:model_memory_bytes", "Memory of a loaded model in bytes.", labels=["model_name"])
        for name, model in self._pool.models.items():
            for value in get_args(Status):
                status.add_metric([name, value], float(model.status == value))
            if model.loaded is not None:
                memory.add_metric([name], model.loaded.bytes)
        yield from (status, memory)
        yield CounterMetricFamily("dso:model_loads", "Number of models that were loaded.", self._pool.loads)
        yield CounterMetricFamily("dso:model_unloads", "Number of models that were unloaded.", self._pool.unloads)
        sources = [QueueCollector(self._pool.shared.queues, "")]
        sources += [model.loaded.state.engine.registry for model in self._pool.loaded if model.loaded is not None]
        merged: dict[str, Metric] = {}
        for source in sources:
            for metric in source.collect():
                known = merged.setdefault(metric.name, metric)
                if known is not metric:
                    known.samples += metric.samples
        yield from merged.values()
