"""The memory that a well-known model needs, computed from its config on PyTorch's meta device: no weights, no download.

Weights: every matrix in the format named, at its packed size with scales and padding; matrices that no precision makes smaller
(`graph/min_formats.py`) in their smallest format; everything else, such as norms, in bf16. Cache: keys and values, or latents,
of one sequence in bf16, whole blocks. Buffers: those of the plan's largest step. On the general path, only linear layers
and experts are packed; cache and buffers are Transformers' own and not counted. Nor are Python, PyTorch and MTP layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .families import GENERAL, PLAN
from .known import KnownModel

CONTEXT = 8192
FORMATS = ("int4", "int8", "bf16")


@dataclass(frozen=True)
class Need:
    """Bytes, and facts about the model.

    Attributes:
        path: "plan" or "general".
        no_plan: why it has no execution plan for decoding; None: it has one.
        parameters: number of parameters.
        weights: bytes of all weights by format of the packed ones.
        cache_per_token: bytes of cache per token of one sequence; 0 for encoders; None on the general path.
        held: tokens that stay in the cache after `CONTEXT` tokens.
        states: bytes of the recurrent states of one sequence, with those that its prefixes store; 0: it has none.
        buffers: bytes of the plan's buffers; 0 on the general path.
    """

    path: str
    no_plan: str | None
    parameters: int
    weights: Mapping[str, int]
    cache_per_token: int | None
    held: int
    states: int
    buffers: int

    def total(self, format_name: str) -> int:
        """Bytes with one sequence of `CONTEXT` tokens."""
        return self.weights[format_name] + self.buffers + self.states + (self.cache_per_token or 0) * self.held


@cache
def need(model: KnownModel) -> Need:
    """What a model needs. Takes up to a second."""
    import torch
    from transformers import CONFIG_MAPPING

    from ..integration.general import is_encoder, why_general
    from ..integration.load.general import empty_model

    config = CONFIG_MAPPING[model.family](**model.fields)
    made = empty_model(config, model.architecture, torch.bfloat16)
    no_plan = why_general(config, strict=False)
    parameters = sum(p.numel() for p in made.parameters())
    if no_plan is None:
        return _planned(made, parameters)
    buffers = _encoder_buffers(made) if is_encoder(config) else None
    needs = _general(made, parameters, no_plan)
    return needs if buffers is None else replace(needs, path=PLAN, cache_per_token=0, buffers=buffers)


def _planned(made: Any, parameters: int) -> Need:
    import torch

    from ..config import DeepSeekConfig
    from ..doctor.memory_estimate import memory_of
    from ..graph.cache_groups import group_layers
    from ..integration.bind.graphs import plan_graph, whole_graph
    from ..integration.bind.swap import swap_on_meta

    settings = DeepSeekConfig(precision="bf16")
    swap_on_meta(made, whole_graph(made), settings, torch.bfloat16)
    graph, _ = plan_graph(made.config, settings.rules, mode=settings.attention)
    budget = memory_of(made, settings, group_layers(graph), free=0)
    weights = {name: budget.weights_in(name) for name in FORMATS}
    return Need(PLAN, None, parameters, weights, budget.cache_per_token, budget.held(CONTEXT), budget.states, budget.buffers)


def _encoder_buffers(made: Any) -> int:
    import torch

    from ..backends.base import CompileOptions
    from ..backends.registry import choose_spec
    from ..config import DeepSeekConfig
    from ..graph.rules import apply
    from ..models import build_encoder_graph

    settings, graph = DeepSeekConfig(), apply(build_encoder_graph(made.config))[0]
    matrices = {name: "bf16" for name in graph.weights() if made.base_model.get_parameter(name).ndim == 2}
    sizes = choose_spec(settings, torch.device("cpu"))[0].sizes()
    return sizes.buffer_bytes(graph, matrices, CompileOptions(), settings.prefill_chunk, 0)


def _general(made: Any, parameters: int, no_plan: str) -> Need:
    import torch

    from ..checkpoint.manifest import PackedEntry
    from ..config import DeepSeekConfig
    from ..integration.bind.modules import Packed
    from ..integration.general import head_name, swap_on_meta
    from ..quant import get_format

    before = sum(p.nbytes for p in made.parameters())
    swap_on_meta(made, DeepSeekConfig(precision="bf16"), torch.bfloat16)
    held = [weight for module in made.modules() if isinstance(module, Packed) for weight in module.held().values()]
    rest = before - sum(2 * math.prod(weight.shape) for weight in held)
    shapes = [tuple(weight.shape) for weight in held]
    head = head_name(made)
    copied = [] if head is None else [tuple(made.get_submodule(head).weight.shape)]  # only if that is smaller than bf16
    weights = {
        name: rest
        + sum(math.prod(PackedEntry(name, s).tiles) for s in (*shapes, *(copied if get_format(name).bits < 16 else ())))
        for name in FORMATS
    }
    return Need(GENERAL, no_plan, parameters, weights, None, 0, 0, 0)
