"""Optimizes a model that is already loaded."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ...backends.base import DECODE, StepBatch, states_of_new
from ...backends.registry import choose_backend
from ...config import DeepSeekConfig
from .. import encoder, general, multimodal
from ..attention.registration import check_attention_name
from ..bind.context_extension import extend_model
from ..bind.graphs import planned_module, whole_graph
from ..bind.runtime import Runtime
from ..bind.swap import pack_in_place
from ..model.bind_plan import bind
from ..model.parameter_count import parameter_bytes
from .quantizer import mark_quantized


def optimize_in_place(model: Any, config: DeepSeekConfig, no_plan: str | None = None) -> None:
    """Packs a model's weights, binds a plan, and warms it up with the smallest and largest batch of `config.batch_size_range`.

    Args:
        model: the model.
        config: the settings.
        no_plan: why the model takes the general path, without a plan; None: it has one.

    Raises:
        ConfigError: a setting does not fit the model.
        UnsupportedModelError: the model has a feature that is not supported.
    """
    earlier = model.__dict__.get("dso")
    if no_plan is not None:
        _optimize_general(model, config, no_plan, parameter_bytes(model) if earlier is None else earlier.bytes_before)
        return
    before = earlier.bytes_before if earlier is not None else parameter_bytes(planned_module(model))
    check_attention_name(model.config, config)
    _own_config(model)
    extend_model(model, config)
    backend, _ = choose_backend(config, model.device)
    pack_in_place(model, whole_graph(model), config, backend.pack)
    mark_quantized(model, config)
    bind(model.eval(), config, earlier=None if earlier is None else earlier.manifest, bytes_before=before)
    for rows in sorted(set(config.batch_size_range)):
        _warm(model.dso, rows)


def _optimize_general(model: Any, config: DeepSeekConfig, no_plan: str, before: int | None) -> None:
    _own_config(model)
    backend, _ = choose_backend(config, model.device)
    language = multimodal.is_whole(model) and multimodal.why_no_language_plan(model.config) is None
    (multimodal if language else general).pack_in_place(model, config, backend.pack)
    mark_quantized(model, config)
    (multimodal if language else encoder).bind(model.eval(), config, no_plan, bytes_before=before)


def _own_config(model: Any) -> None:
    """Gives the model its own copy of the config, because optimization writes into it."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def _warm(runtime: Runtime, rows: int) -> None:
    """Runs one step of `rows` sequences over a temporary cache and discards the result."""
    groups = runtime.graph.cache.groups
    store = runtime.backend.new_store(runtime.graph, runtime.kv_dtype, groups * rows, rows if runtime.graph.states else 0)
    state_from, state_to = states_of_new(np.ones(rows, np.int32))
    runtime.plan.run(
        StepBatch(
            token_ids=np.zeros(rows, np.int32),
            positions=np.zeros(rows, np.int32),
            query_len=np.ones(rows, np.int32),
            context_len=np.zeros(rows, np.int32),
            phase=np.full(rows, DECODE, np.int32),
            block_table=np.arange(groups * rows, dtype=np.int32).reshape((groups, rows, 1) if groups > 1 else (rows, 1)),
            logit_rows=np.arange(rows if runtime.graph.has_head else 0, dtype=np.int32),
            state_from=state_from,
            state_to=state_to,
        ),
        store,
    )
