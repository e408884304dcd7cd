"""Whether a backend can run a model, which is checked before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...backends.base import Capabilities, check_supported
from ...backends.registry import choose_backend, find
from ...config import DeepSeekConfig
from ...graph.ir import Graph
from ...system.backend_entries import AUTO
from .graphs import planned_graph, planned_module, planned_mtp_graphs
from .swap import matrices_of


def kv_dtype(config: DeepSeekConfig, formats: Iterable[str]) -> str:
    """Storage format of the KV cache for a model whose matrices have these formats: the config's, or the default."""
    if config.kv_cache != "auto":
        return config.kv_cache
    if set(formats) == {"fp32"}:
        return "fp32"
    return "int8" if config.sparse_attention else "bf16"


def formats_of(model: Any, graph: Graph) -> list[str]:
    """The formats of the matrices of a graph, each once."""
    return sorted({matrix.format for matrix in matrices_of(model, graph).values()})


def check_settings(capabilities: Capabilities, model: Any, graph: Graph, config: DeepSeekConfig) -> None:
    """Raises BackendError, with the alternatives, if a backend does not have a format, the attention mode or the
    activation format of a model."""
    formats = formats_of(model, graph)
    mode = "eager" if config.attention_optimization == "eager" else config.attention.kind
    check_supported(capabilities, formats, kv_dtype(config, formats), mode, config.activation)


def check_runnable(model: Any, config: DeepSeekConfig, device: torch.device) -> None:
    """Checks that the backend that the settings name can run a model; without a name, `bind` finds one that can.

    Args:
        model: the model, with packed modules, which may be on the meta device.
        config: the settings.
        device: where the model is going to be.

    Raises:
        BackendError: it cannot, on this device or at all; names what is missing, and what to use instead.
    """
    if config.backend == AUTO:
        return
    backend, _ = choose_backend(config, device)
    planned = planned_module(model)
    graph, _, _ = planned_graph(planned, config)
    check_settings(backend.capabilities, planned, graph, config)
    kv_cache = kv_dtype(config, formats_of(planned, graph))
    for each in (graph, *planned_mtp_graphs(planned, config, graph)):
        find(config.backend).check_graph(each, kv_cache)
