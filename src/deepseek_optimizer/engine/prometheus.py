"""Exports the engine's metrics to Prometheus, under vLLM's names where the meaning is the same.

Needs `prometheus-client`. Does not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ..cache.block_manager import BLOCK_TOKENS
from .adapters import Adapters
from .core import EngineCore
from .encoder_core import EncoderCore
from .metrics import Histogram
from .scheduling.learned_policy import LearnedPolicy
from .scheduling.lowering import Lowering

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# name, attribute of EngineMetrics, description
_COUNTERS = (
    ("vllm:prompt_tokens", "prompt_tokens", "Number of prompt tokens processed."),
    ("vllm:generation_tokens", "generated_tokens", "Number of tokens generated."),
    ("vllm:num_preemptions", "preemptions", "Number of preemptions."),
    ("vllm:prefix_cache_hits", "cached_tokens", "Number of prompt tokens found in the prefix cache."),
    ("vllm:prefix_cache_queries", "looked_up_tokens", "Number of prompt tokens looked up in the prefix cache."),
    ("dso:steps", "steps", "Number of steps of the model."),
    ("dso:copied_logit_rows", "copied_rows", "Number of rows of logits copied from a device to choose or score tokens."),
    ("dso:step_seconds", "step_seconds", "Time spent in steps in seconds."),
)
_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "first", "Time from arrival to the first token in seconds."),
    ("vllm:inter_token_latency_seconds", "between", "Time between tokens of a request in seconds; tokens of a step share it."),
    ("vllm:e2e_request_latency_seconds", "whole", "Time from arrival to the end of a request in seconds."),
    ("vllm:request_queue_time_seconds", "waits", "Time from arrival to the first step in seconds."),
    ("vllm:request_inference_time_seconds", "inference", "Time from the first step to the end of a request in seconds."),
    ("vllm:request_prefill_time_seconds", "prefill", "Time from the first step to the first token in seconds."),
    ("vllm:request_decode_time_seconds", "decode", "Time from the first token to the end of a request in seconds."),
    ("vllm:request_num_preemptions", "preempted", "Number of preemptions of a request."),
    ("vllm:request_params_max_tokens", "limits", "max_tokens of a request that gives it."),
    ("vllm:request_params_n", "answers", "Number of answers that a client's request asks for."),
    ("vllm:iteration_tokens_total", "step_tokens", "Number of tokens in a step, of prompts and generated ones."),
    ("vllm:request_prompt_tokens", "prompts", "Number of prompt tokens of a request."),
    ("vllm:request_generation_tokens", "texts", "Number of tokens generated for a request."),
)


class MeasuredEngine(Protocol):
    """The attributes of an `AsyncEngine` that the collector reads."""

    core: EngineCore | EncoderCore
    model_name: str

    refused: int

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
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Number of requests waiting for the batch, by reason.",
            labels=[*label, "reason"],
        )
        reasons.add_metric([*names, "capacity"], waiting)
        yield reasons
        refused = CounterMetricFamily("vllm:admission_rejections", "Number of requests refused by a full queue.", labels=label)
        refused.add_metric(names, engine.refused)
        yield refused
        yield gauge("dso:requests_admitted", "Number of places in the queue that are taken.", engine.admitted)
        if isinstance(core, EngineCore):
            yield gauge("dso:batch_size", "Maximum number of sequences in the batch.", core.scheduler.batch.choose())
            yield gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", core.cache_usage())
            size = {
                "block_size": str(BLOCK_TOKENS),
                "num_gpu_blocks": str(core.blocks),  # of any device: routers find it under this name
                "kv_cache_size_tokens": str(core.room),
                "kv_cache_max_concurrency": str(core.options.batch_size_range[1]),
            }
            config = GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache.", labels=[*label, *size])
            config.add_metric([*names, *size.values()], 1)
            yield config
            if core.lowering is not None:
                yield from _qualities(core, core.lowering, engine.model_name)
            if core.adapters is not None:
                yield _adapters(core.adapters, engine.model_name)
            if isinstance(core.policy, LearnedPolicy):
                yield from _learned(core.policy, engine.model_name)
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
        if isinstance(core, EngineCore) and (stored := core.scheduler.stored) is not None:
            yield gauge("dso:prefix_files_bytes", "Size of the prefix cache's directory in bytes.", stored.store.size)
            for name, value, text in (
                ("dso:prefix_files_read", stored.reader.parts, "Number of blocks and states read from files."),
                ("dso:prefix_files_read_bytes", stored.reader.bytes, "Bytes of blocks and states read from files."),
                ("dso:prefix_files_written", stored.store.written_files, "Number of blocks and states written to files."),
                ("dso:prefix_files_written_bytes", stored.store.written_bytes, "Bytes written to files."),
                ("dso:prefix_files_evicted", stored.store.evicted_files, "Number of files deleted to stay within the limit."),
                ("dso:prefix_files_damaged", stored.store.damaged_files, "Number of damaged files that were deleted."),
                ("dso:prefix_files_dropped", stored.writer.dropped, "Number of blocks and states that were not written."),
            ):
                counter = CounterMetricFamily(name, text, labels=label)
                counter.add_metric(names, value)
                yield counter
        for name, attribute, text in _HISTOGRAMS:
            histogram: Histogram = getattr(core.metrics, attribute)
            family = HistogramMetricFamily(name, text, labels=label)
            family.add_metric(names, _buckets(histogram), histogram.sum)
            yield family


def _adapters(adapters: Adapters, model_name: str) -> Metric:
    """The loaded LoRA adapters, as routers of the Gateway API inference extension read them. None waits: requests can name only
    adapters that are loaded."""
    running = ", ".join(adapter.name for adapter in adapters.loaded if "," not in adapter.name)  # others would be read as two
    labels = {"max_lora": str(adapters.store.slots), "running_lora_adapters": running, "waiting_lora_adapters": ""}
    family = GaugeMetricFamily(
        "vllm:lora_requests_info", "Loaded LoRA adapters; the value is the time of the scrape.", labels=["model_name", *labels]
    )
    family.add_metric([model_name, *labels.values()], time.time())
    return family


def _qualities(core: EngineCore, lowering: Lowering, model_name: str) -> Iterator[Metric]:
    """At which qualities requests were computed, and whether some are lowered now."""
    label, names = ["model_name"], [model_name]
    ended = CounterMetricFamily(
        "dso:requests_by_quality", "Number of ended requests by the quality they were computed at.", labels=[*label, "quality"]
    )
    for quality, count in dict(core.metrics.qualities).items():
        ended.add_metric([*names, quality], count)
    yield ended
    lowered = CounterMetricFamily(
        "dso:requests_lowered", "Number of ended requests computed at a lower quality than they asked for.", labels=label
    )
    lowered.add_metric(names, core.metrics.lowered)
    yield lowered
    active = GaugeMetricFamily(
        "dso:quality_lowered", "1 while requests that start are computed at the lowest quality they allow.", labels=label
    )
    active.add_metric(names, lowering.active)
    yield active


def _learned(policy: LearnedPolicy, model_name: str) -> Iterator[Metric]:
    """What the learned policy has decided, and what that has cost by its own estimates."""
    label, names = ["model_name"], [model_name]
    decisions = CounterMetricFamily(
        "dso:policy_decisions", "Number of periods that limits of steps were in force.", labels=[*label, "limits"]
    )
    for limits, count in dict(policy.decisions).items():
        decisions.add_metric([*names, str(limits)], count)
    yield decisions
    for name, value, text in (
        (
            "dso:policy_regret_seconds",
            policy.regret,
            "Seconds of requests (latency) or steps lost against the best fixed limits.",
        ),
        ("dso:policy_credit_seconds", policy.credit.seconds, "Such seconds that other limits than the options may still cost."),
    ):
        family = GaugeMetricFamily(name, text, labels=label)
        family.add_metric(names, value)
        yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Returns (upper bound, cumulative count) of each bucket."""
    total, buckets = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], list(histogram.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets
