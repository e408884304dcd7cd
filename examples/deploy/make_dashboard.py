"""Writes grafana-dashboard.json, a Grafana dashboard of the server's Prometheus metrics: python make_dashboard.py

A panel is a title, a unit and PromQL queries; a test compares the metrics in them with those of a server's /metrics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("grafana-dashboard.json")
_MODEL = '{model_name=~"$model"}'
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8


class Panel(NamedTuple):
    """A graph. unit: Grafana's name. queries: legend -> PromQL."""

    title: str
    unit: str
    queries: dict[str, str]


def _rate(metric: str, labels: str = _MODEL, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{labels}[$__rate_interval]))"


def _quantiles(metric: str, labels: str = _MODEL) -> dict[str, str]:
    return {
        f"p{int(100 * q)}": f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{labels}[$__rate_interval])))"
        for q in (0.5, 0.95, 0.99)
    }


def _share(part: str, whole: str) -> str:
    return f"{_rate(part)} / {_rate(whole)}"


PANELS = {
    "Traffic": [
        Panel("HTTP requests by status", "reqps", {"{{status}}": _rate("http_requests_total", "", "status")}),
        Panel("HTTP requests by route", "reqps", {"{{handler}}": _rate("http_requests_total", "", "handler")}),
        Panel("HTTP request duration", "s", _quantiles("http_request_duration_seconds", "")),
        Panel(
            "Tokens", "ops",
            {"prompt": _rate("vllm:prompt_tokens_total"), "generated": _rate("vllm:generation_tokens_total")},
        ),
        Panel(
            "Ended requests by reason", "reqps",
            {"{{finished_reason}}": _rate("vllm:request_success_total", by="finished_reason")},
        ),
        Panel(
            "Requests", "short",
            {
                "running": f"sum(vllm:num_requests_running{_MODEL})",
                "waiting": f"sum(vllm:num_requests_waiting{_MODEL})",
                "waiting: {{reason}}": f"sum by (reason) (vllm:num_requests_waiting_by_reason{_MODEL})",
                "admitted": f"sum(dso:requests_admitted{_MODEL})",
            },
        ),
        Panel("Refused requests", "reqps", {"full queue": _rate("vllm:admission_rejections_total")}),
        Panel("Answers of a request", "short", _quantiles("vllm:request_params_n")),
        Panel("max_tokens of a request", "short", _quantiles("vllm:request_params_max_tokens")),
    ],
    "Latency": [
        Panel("Time to first token", "s", _quantiles("vllm:time_to_first_token_seconds")),
        Panel("Time between tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
        Panel("Whole request", "s", _quantiles("vllm:e2e_request_latency_seconds")),
        Panel("Time in the engine's queue", "s", _quantiles("vllm:request_queue_time_seconds")),
        Panel("Time in the batch", "s", _quantiles("vllm:request_inference_time_seconds")),
        Panel("Time of the prompt", "s", _quantiles("vllm:request_prefill_time_seconds")),
        Panel("Time of the text", "s", _quantiles("vllm:request_decode_time_seconds")),
        Panel("Prompt tokens of a request", "short", _quantiles("vllm:request_prompt_tokens")),
        Panel("Generated tokens of a request", "short", _quantiles("vllm:request_generation_tokens")),
    ],
    "Engine": [
        Panel("KV cache in use", "percentunit", {"in use": f"max(vllm:kv_cache_usage_perc{_MODEL})"}),
        Panel(
            "Prompt tokens from the prefix cache", "percentunit",
            {"cached": _share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")},
        ),
        Panel("Preemptions", "ops", {"preemptions": _rate("vllm:num_preemptions_total")}),
        Panel("Preemptions of a request", "short", _quantiles("vllm:request_num_preemptions")),
        Panel("Tokens of a step", "short", _quantiles("vllm:iteration_tokens_total")),
        Panel(
            "Size of the KV cache", "short",
            {"{{kv_cache_size_tokens}} tokens": f"max by (kv_cache_size_tokens) (vllm:cache_config_info{_MODEL})"},
        ),
        Panel(
            "Loaded LoRA adapters", "short",
            {"{{running_lora_adapters}}": f"count by (running_lora_adapters) (vllm:lora_requests_info{_MODEL})"},
        ),
        Panel("Sleep", "short", {"{{sleep_state}}": f"max by (sleep_state) (vllm:engine_sleep_state{_MODEL})"}),
        Panel("Time of a step", "s", {"mean": _share("dso:step_seconds_total", "dso:steps_total")}),
        Panel("Periods of the learned policy", "ops", {"{{limits}}": _rate("dso:policy_decisions_total", by="limits")}),
        Panel(
            "Estimates of the learned policy", "s",
            {"regret": f"max(dso:policy_regret_seconds{_MODEL})", "credit": f"max(dso:policy_credit_seconds{_MODEL})"},
        ),
        Panel("Largest batch", "short", {"sequences": f"max(dso:batch_size{_MODEL})"}),
        Panel("Rows of logits copied from a device", "short", {"rows": _rate("dso:copied_logit_rows_total")}),
        Panel(
            "Accepted draft tokens", "percentunit",
            {"accepted": _share("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total")},
        ),
    ],
    "Queues of the server": [
        Panel("Waiting jobs", "short", {"{{queue}}": f"sum by (queue) (dso:queue_waiting{_MODEL})"}),
        Panel("Running jobs", "short", {"{{queue}}": f"sum by (queue) (dso:queue_running{_MODEL})"}),
        Panel(
            "Jobs by outcome", "ops",
            {"{{queue}}: {{outcome}}": _rate("dso:queue_jobs_total", by="queue, outcome")},
        ),
        Panel("Seconds waited per second", "short", {"{{queue}}": _rate("dso:queue_wait_seconds_total", by="queue")}),
        Panel("Seconds worked per second", "short", {"{{queue}}": _rate("dso:queue_run_seconds_total", by="queue")}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, contents in PANELS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})  # fmt: skip
        for place, panel in enumerate(contents):
            at = {"x": place % _COLUMNS * _WIDTH, "y": y + 1 + place // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            panels.append({"id": len(panels) + 1, **_graph(panel), "gridPos": at})
        y += 1 + -(-len(contents) // _COLUMNS) * _HEIGHT
    return {
        "title": "deepseek-optimizer", "uid": "deepseek-optimizer", "schemaVersion": 39, "version": 1, "editable": True,
        "refresh": "15s", "time": {"from": "now-1h", "to": "now"}, "tags": ["llm"], "timezone": "browser",
        "templating": {"list": [_data_source(), _model()]}, "panels": panels,
    }  # fmt: skip


def _graph(panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(65 + i), "datasource": source, "expr": query, "legendFormat": legend}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries", "title": panel.title, "datasource": source, "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
    }  # fmt: skip


def _data_source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _model() -> dict[str, Any]:
    return {
        "name": "model", "type": "query", "label": "Model", "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": "label_values(dso:requests_admitted, model_name)", "includeAll": True, "multi": True, "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def text() -> str:
    """The content of grafana-dashboard.json."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
