"""Exports whether the server sleeps to Prometheus, under vLLM's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, get_args

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

SleepState = Literal["awake", "weights_offloaded", "discard_all"]


class SleepCollector(Collector):
    """A gauge for each state: 1 for the current one, 0 for the others.

    Args:
        current: returns the state.
        model_name: of the model in the API.
    """

    def __init__(self, current: Callable[[], SleepState], model_name: str) -> None:
        self._current, self._model_name = current, model_name

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "sleep_state"]
        family = GaugeMetricFamily("vllm:engine_sleep_state", "State of the server: 1 for the current one.", labels=labels)
        for state in get_args(SleepState):
            family.add_metric([self._model_name, state], float(state == self._current()))
        yield family
