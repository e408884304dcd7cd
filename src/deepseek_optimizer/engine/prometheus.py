"""Exports the engine's metrics to Prometheus, under vLLM's names where the meaning is the same.

Needs `prometheus-client`. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from .core import EngineCore
from .encoder_core import EncoderCore
from .metrics import Histogram

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# name, attribute of EngineMetrics, description
_COUNTERS = (
    ("vllm:prompt_tokens", "prompt_tokens", "Number of prompt tokens processed."),
    ("vllm:generation_tokens", "generated_tokens", "Number of tokens generated."),
    ("vllm:num_preemptions", "preemptions", "Number of preemptions."),
    ("vllm:prefix_cache_hits", "cached_tokens", "Number of prompt tokens found in the prefix cache."),
    ("dso:steps", "steps", "Number of steps of the model."),
    ("dso:step_seconds", "step_seconds", "Time spent in steps in seconds."),
)
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "first", "Time from arrival to the first token in seconds."),
    ("vllm:inter_token_latency_seconds", "between", "Time between tokens of a request in seconds; tokens of a step share it."),
    ("vllm:e2e_request_latency_seconds", "whole", "Time from arrival to the end of a request in seconds."),
    ("vllm:request_queue_time_seconds", "waits", "Time from arrival to the first step in seconds."),
    ("vllm:request_prompt_tokens", "prompts", "Number of prompt tokens of a request."),
    ("vllm:request_generation_tokens", "texts", "Number of tokens generated for a request."),
)


class MeasuredEngine(Protocol):
    """The attributes of an `AsyncEngine` that the collector reads."""

    core: EngineCore | EncoderCore
    model_name: str

    @property
    def admitted(self) -> int:
        """Number of requests that hold a place in the queue."""


class EngineCollector(Collector):
    """Collects the metrics of an engine at each scrape; a step in progress may or may not be counted."""

    def __init__(self, engine: MeasuredEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, core = self._engine, self._engine.core
        label, names = ["model_name"], [engine.model_name]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, text, labels=label)
            family.add_metric(names, value)
            return family

        running, waiting = core.load
        yield gauge("vllm:num_requests_running", "Number of requests in the running batch.", running)
        yield gauge("vllm:num_requests_waiting", "Number of requests waiting for the batch.", waiting)
        yield gauge("dso:requests_admitted", "Number of places in the queue that are taken.", engine.admitted)
        if isinstance(core, EngineCore):
            yield gauge("dso:batch_size", "Maximum number of sequences in the batch.", core.scheduler.batch.choose())
            yield gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", core.cache_usage())
        for name, attribute, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=label)
            counter.add_metric(names, getattr(core.metrics, attribute))
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Number of ended requests by reason.", labels=[*label, "finished_reason"]
        )
        for reason, count in dict(core.metrics.finished).items():
            finished.add_metric([*names, reason], count)
        yield finished
        if isinstance(core, EngineCore) and core.drafting is not None:
            for name, value, text in (
                ("vllm:spec_decode_num_draft_tokens", core.drafting.proposed, "Number of draft tokens verified."),
                ("vllm:spec_decode_num_accepted_tokens", core.drafting.accepted, "Number of draft tokens accepted."),
            ):
                counter = CounterMetricFamily(name, text, labels=label)
                counter.add_metric(names, value)
                yield counter
        for name, attribute, text in _HISTOGRAMS:
            histogram: Histogram = getattr(core.metrics, attribute)
            family = HistogramMetricFamily(name, text, labels=label)
            family.add_metric(names, _buckets(histogram), histogram.sum)
            yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Returns (upper bound, cumulative count) of each bucket."""
    total, buckets = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], list(histogram.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets
