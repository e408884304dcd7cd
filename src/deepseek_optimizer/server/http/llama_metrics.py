"""The engine's metrics under llama-server's names, for dashboards that were made for it.

They have no label for the model, and some names (a counter without `_total`) are not possible in prometheus_client, so the text
is written here. Names and meanings: `handle_metrics` in llama.cpp's tools/server/server-context.cpp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_COUNTERS = (
    ("prompt_tokens_total", "Number of prompt tokens processed."),
    ("prompt_tokens_cached_total", "Number of prompt tokens found in the prefix cache."),
    ("prompt_seconds_total", "Prompt process time"),
    ("tokens_predicted_total", "Number of generation tokens processed."),
    ("tokens_predicted_seconds_total", "Predict process time"),
    ("n_decode_total", "Total number of steps of the model"),
    ("n_tokens_max", "Largest observed number of tokens of a request."),
    ("spec_decode_num_draft_tokens_total", "Number of draft tokens verified."),
    ("spec_decode_num_accepted_tokens_total", "Number of draft tokens accepted."),
    ("spec_decode_num_drafts_total", "Number of drafts verified."),
)
_GAUGES = (
    ("prompt_tokens_seconds", "Average prompt throughput in tokens/s since the last scrape."),
    ("predicted_tokens_seconds", "Average generation throughput in tokens/s since the last scrape."),
    ("requests_processing", "Number of requests processing."),
    ("requests_deferred", "Number of requests deferred."),
    ("n_busy_slots_per_decode", "Average number of sequences per step of the model"),
)


class _Totals(NamedTuple):
    """Tokens and seconds of prompts and of generation; of the latter without first tokens, which cost no step."""

    prompt: int
    prompt_seconds: float
    decoded: int
    decode_seconds: float


class LlamaMetrics:
    """Writes the metrics of an engine.

    Args:
        engine: an `AsyncEngine`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._scraped = _Totals(0, 0.0, 0, 0.0)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format. Throughputs are those since the last call."""
        metrics = self._engine.metrics
        last, now = self._scraped, _totals(metrics)
        self._scraped = now
        running, waiting = self._engine.load
        drafted, accepted, drafts = self._engine.drafted
        values = {
            "prompt_tokens_total": metrics.prompt_tokens,
            "prompt_tokens_cached_total": metrics.cached_tokens,
            "prompt_seconds_total": now.prompt_seconds,
            "tokens_predicted_total": metrics.generated_tokens,
            "tokens_predicted_seconds_total": now.decode_seconds,
            "n_decode_total": metrics.steps,
            "n_tokens_max": metrics.longest,
            "spec_decode_num_draft_tokens_total": drafted,
            "spec_decode_num_accepted_tokens_total": accepted,
            "spec_decode_num_drafts_total": drafts,
            "prompt_tokens_seconds": _rate(now.prompt - last.prompt, now.prompt_seconds - last.prompt_seconds),
            "predicted_tokens_seconds": _rate(now.decoded - last.decoded, now.decode_seconds - last.decode_seconds),
            "requests_processing": running,
            "requests_deferred": waiting,
            "n_busy_slots_per_decode": metrics.step_sequences / max(metrics.steps, 1),
        }
        lines = []
        for kind, metrics_of_kind in (("counter", _COUNTERS), ("gauge", _GAUGES)):
            for name, help in metrics_of_kind:
                full = f"llamacpp:{name}"
                lines += [f"# HELP {full} {help}", f"# TYPE {full} {kind}", f"{full} {values[name]:.12g}"]
        return ("\n".join(lines) + "\n").encode()


def _totals(metrics: Any) -> _Totals:
    between = metrics.between
    return _Totals(metrics.prompt_tokens, metrics.prompt_seconds, sum(between.counts), between.sum)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
