"""The engine's metrics for Prometheus, by vLLM's names where they mean the same. Needs `prometheus-client`. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from .core import EngineCore
from .metrics import Histogram

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# name, attribute of EngineMetrics, what it is
_COUNTERS = (
    ("vllm:prompt_tokens", "prompt_tokens", "Prompt tokens that were run."),
    ("vllm:generation_tokens", "generated_tokens", "Tokens that were generated."),
    ("vllm:num_preemptions", "preemptions", "How often a request lost its blocks to another."),
    ("vllm:prefix_cache_hits", "cached_tokens", "Prompt tokens that came out of the prefix cache."),
    ("dso:steps", "steps", "Steps of the model."),
    ("dso:step_seconds", "step_seconds", "Seconds spent in them."),
)
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "first", "From arrival to the first token."),
    ("vllm:inter_token_latency_seconds", "between", "Between a request's tokens; those of one step share its time."),
    ("vllm:e2e_request_latency_seconds", "whole", "From arrival to the end."),
    ("vllm:request_queue_time_seconds", "waits", "From arrival to the first step."),
    ("vllm:request_prompt_tokens", "prompts", "Tokens of prompts."),
    ("vllm:request_generation_tokens", "texts", "Tokens of answers."),
)


class MeasuredEngine(Protocol):
    """What the collector reads of an `AsyncEngine`."""

    core: EngineCore
    model_name: str

    @property
    def admitted(self) -> int:
        """Requests that hold a place in the queue."""


class EngineCollector(Collector):
    """Reads the engine at each scrape; a step that runs at that moment may or may not be counted."""

    def __init__(self, engine: MeasuredEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, core = self._engine, self._engine.core
        label, names = ["model_name"], [engine.model_name]

        def gauge(name: str, text: str, value: float) -> Metric:
            found = GaugeMetricFamily(name, text, labels=label)
            found.add_metric(names, value)
            return found

        scheduler = core.scheduler
        yield gauge("vllm:num_requests_running", "Requests that take part in steps.", len(scheduler.running))
        yield gauge("vllm:num_requests_waiting", "Requests that wait for blocks or a place.", len(scheduler.waiting))
        yield gauge("dso:requests_admitted", "Places of the queue that are taken.", engine.admitted)
        yield gauge("dso:batch_size", "Sequences that may run at once, by measured step times.", scheduler.batch.choose())
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache in use, 1 being all.", core.cache_usage())
        for name, attribute, text in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=label)
            counter.add_metric(names, getattr(core.metrics, attribute))
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=[*label, "finished_reason"]
        )
        for reason, count in dict(core.metrics.finished).items():
            finished.add_metric([*names, reason], count)
        yield finished
        if core.drafting is not None:
            for name, value, text in (
                ("vllm:spec_decode_num_draft_tokens", core.drafting.proposed, "Drafts that were verified."),
                ("vllm:spec_decode_num_accepted_tokens", core.drafting.held, "Drafts that held."),
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
    """Counts of all values up to each bound."""
    total, found = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], list(histogram.counts), strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return found
