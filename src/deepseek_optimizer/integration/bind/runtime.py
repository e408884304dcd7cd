"""The runtime of an optimized model: config, graph, plan, backend and cache memory, and whether the plan can serve a call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...backends.base import CompileOptions, Plan
from ...backends.nested_weights import at_quality, has_qualities
from ...backends.parallel import RankBackend, StageBackend
from ...backends.prompt_plan import PromptPlan
from ...backends.qualities import EXACT, Quality
from ...cache.forgetting import SPARE_OF_COPIES, Forgetting, Groups, max_blocks
from ...checkpoint import Manifest
from ...config import DeepSeekConfig
from ...engine.speculative.draft_length import SpeculationReport
from ...errors import BackendError, ConfigError, UnsupportedModelError
from ...graph import rules
from ...graph.adapters import UNFUSED, with_adapters
from ...graph.attention_mode import apply_mode
from ...graph.cache_groups import cached_in, group_spans
from ...graph.ir import Graph
from ...graph.partial_graph import writing_graph
from ...graph.rope_rotation import KeyRotation, key_rotation
from ...models.families import FAMILIES
from ...quant import PackedWeight
from ..memory.arena import Arena, LatentRow, WindowRows
from ..memory.cache_size import (
    SLOTS_PER_SEQUENCE,
    CacheSize,
    FullBatch,
    check_granted,
    check_reserved,
    for_batch,
    granted,
    what_is_free,
)
from ..memory.growth import CheckedGrowth
from .adapted_plan import LayerAdapters
from .context_extension import extension_note
from .graphs import (
    draft_vocabularies,
    loaded_mtp_layers,
    model_graph,
    planned_graph,
    planned_mtp_graphs,
    whole_graph,
    with_eps_of,
)
from .host_experts import Placement, host_experts
from .lora_layers import LowRank, added_by
from .module_tree import ModuleTree
from .modules import Packed
from .packed_model import OptimizerWarning as OptimizerWarning
from .packed_model import PackedModel, packed_model_of
from .runnable import check_settings, formats_of, kv_dtype
from .swap import matrices_of, weights_of

_log = logging.getLogger(__name__)


def groups_of(graph: Graph) -> Groups:
    """Which tokens the cache of a model with this graph may drop, for each group of its layers; None: none."""
    own = graph.cache.own_groups
    return tuple(
        None if span is None else Forgetting(*span) if n < own else Forgetting(*span, SPARE_OF_COPIES, copies=True)
        for n, span in enumerate(group_spans(graph))
    )


class Runtime(PackedModel):
    """Binds a plan to one model instance, whose forward the plan replaces. Available as `model.dso`.

    Args:
        model: the instance: the whole model, or, without the family's language model head, its decoder.
        config, manifest, methods, make_report, bytes_before: as in `PackedModel`.
        notes: warnings from loading.

    Attributes: those of `PackedModel`, and
        graph, rules: the graph, and what the fusion rules changed in it.
        in_mode: number of layers whose attention was changed by the config's attention mode.
        draft_vocabularies: for each of `mtp_plans` the tokens that it has logits for; None: all.
        placement: where routed experts are, if the model went to a device.
        speculation: `engine.speculative.draft_length.SpeculationReport` of the last request that used drafts.
    """

    def __init__(
        self,
        model: Any,
        config: DeepSeekConfig,
        manifest: Manifest,
        *,
        methods: Callable[[Runtime], dict[str, Any]],
        make_report: Callable[[Runtime], Any],
        bytes_before: int | None = None,
        notes: list[str] | None = None,
    ) -> None:
        super().__init__(model, config, manifest, methods=methods, make_report=make_report, bytes_before=bytes_before)
        self.graph, self.rules, self.in_mode = planned_graph(model, config)
        self.speculation: SpeculationReport | None = None
        self.placement: Placement | None = None
        for note in (*(notes or ()), *filter(None, (extension_note(config, model.config),))):
            self.warn_once(note)
        self._plan: Plan | None = None
        self._mtp_plans: list[Plan] | None = None
        self._arena: Arena | None = None
        self._adapters: LayerAdapters | None = None
        self._tree = ModuleTree(model)
        self.draft_vocabularies = draft_vocabularies(model)
        _check_bound(model, whole_graph(model))

    @property
    def plan(self) -> Plan:
        """The compiled plan; recompiled after the storage of the weights has changed."""
        with self._making:
            if self._plan is None:
                check_settings(self.backend.capabilities, self.model, self.graph, self.config)
                self._plan = self.compile(self.graph)
            return self._plan

    @property
    def has_qualities(self) -> bool:
        """Whether the model's matrices contain others, so that `compile` has several qualities."""
        return has_qualities(self.weights_of(self.graph))

    def compile(self, graph: Graph, quality: Quality = EXACT) -> Plan:
        """Compiles a graph of this model (`graph`, `adapter_graph`); plans share the model's weights.

        Args:
            graph: the graph.
            quality: how much of the weights the plan reads, see `backends.nested_weights`.
        """
        graph, weights = at_quality(quality, graph, self.weights_of(graph))
        plan = self.backend.compile(graph, weights, self.compile_options)
        if (beginning := writing_graph(graph)) is not None:
            plan = PromptPlan(plan, self.backend.compile(beginning, weights, self.compile_options))
        high = self.config.batch_size_range[1]
        plan.reserve(max(self.config.prefill_chunk, high), high)
        return plan

    def plan_of(self, quality: Quality) -> Plan:
        """Compiles the plan of a quality, in all processes that run the model."""
        compile_own = partial(self.compile, self.graph, quality)
        if isinstance(self.backend, RankBackend | StageBackend):
            _ = self.plan  # the first one
            return self.backend.compile_in_all(quality, compile_own)
        return compile_own()

    def adapter_graph(self, rank: int) -> Graph:
        """The model's graph with sites for LoRA adapters of rank `rank` at most. It has the same cache and states."""
        names = rules.RULES if self.config.rules is None else self.config.rules
        graph, _ = model_graph(self.model, tuple(n for n in names if n not in UNFUSED), loaded_mtp_layers(self.model))
        graph, _ = apply_mode(with_eps_of(self.model, graph), self.config.attention)
        return with_adapters(cached_in(graph, self.config.kv_cache), rank)

    @property
    def current_plan(self) -> Plan:
        """The plan to run now: `plan`, or with active LoRA adapters of PEFT one that adds them. See `unserved`."""
        with self._making:
            parts = self._added()
            if isinstance(parts, str) or not any(parts.values()):
                return self.plan
            assert self._adapters is not None
            plan: Plan = self._adapters.plan({path: added for path, added in parts.items() if added})
            return plan

    def _added(self) -> dict[str, list[LowRank]] | str:
        """What PEFT's LoRA layers add, by path of their modules; or why no plan can serve the module tree."""
        layers = self._tree.lora_layers(self.model)
        if isinstance(layers, str) or not layers:
            return layers if isinstance(layers, str) else {}
        if self._adapters is None:
            if not self.backend.capabilities.adapters:
                return f"the {self.backend.name} backend has no adapters"
            self._adapters = LayerAdapters(self.backend, self.adapter_graph, self.compile)
        added: dict[str, list[LowRank]] = {}
        for path, layer in layers.items():
            parts = added_by(layer)
            if isinstance(parts, str):
                return parts
            if parts and not self._adapters.covers(path):
                return f"module {path!r} has an adapter"
            added[path] = parts
        return added

    @property
    def mtp_plans(self) -> list[Plan]:
        """The plans of the loaded MTP layers by depth, compiled on first access."""
        with self._making:
            if self._mtp_plans is None:
                graphs, options = planned_mtp_graphs(self.model, self.config, self.graph), self.compile_options
                self._mtp_plans = [self.backend.compile(g, self.weights_of(g), options) for g in graphs]
            return self._mtp_plans

    def weights_of(self, graph: Graph) -> dict[str, PackedWeight | torch.Tensor]:
        """Those weights of a graph that this process has."""
        names = self.backend.weights_in(graph) if isinstance(self.backend, StageBackend) else None
        return weights_of(self.model, graph, names)

    @property
    def compile_options(self) -> CompileOptions:
        """The options of `Backend.compile` from the config, and from where experts are."""
        return CompileOptions(self.config.activation, host_experts(self.model))

    @property
    def arena(self) -> Arena:
        with self._making:
            if self._arena is None:
                self._arena = self.new_arena(self.config.kv_cache_memory)
            return self._arena

    def new_arena(self, memory: int | None) -> Arena:
        """Creates a further arena of cache memory for this model, separate from `arena`.

        Args:
            memory: maximum size in bytes; None: the free memory, less a reserve.

        Raises:
            NotEnoughMemoryError: a limit on address space leaves less.
        """
        return self._arena_of(what_is_free(self.backend.free_memory()) if memory is None else granted(memory))

    def prepare_for(self, sequences: int, step_tokens: int) -> None:
        """Prepares for an engine with other limits than the config's, as if the model had been loaded with them: reserves
        buffers for its steps, and discards `arena`, so that the engine gets one of its own size. Engines that run keep theirs.

        Args:
            sequences: maximum number of sequences in a step.
            step_tokens: maximum number of tokens in a step.
        """
        self.plan.reserve(max(step_tokens, sequences), sequences)
        with self._making:
            self._arena = None

    def full_batch(self, sequences: int, tokens: int, step_tokens: int) -> FullBatch:
        """The maximum cache memory of `sequences` sequences of `tokens` tokens each, processed in steps of `step_tokens`."""
        groups = groups_of(self.graph)
        # one more block of each group, to continue into, or for the copy of a shared block
        blocks = max_blocks(groups, tokens, step_tokens) + len(groups)
        states = sequences * SLOTS_PER_SEQUENCE * self._state_bytes
        return FullBatch(sequences, tokens, sequences * blocks * self._block_bytes + states, states)

    def serving_arena(self, batch: FullBatch, beside: int = 0) -> Arena:
        """The model's `arena`, for an engine. If it does not exist yet and the config sets no size, it may grow to what a full
        batch needs, but at most to half of the free memory.

        Args:
            batch: from `full_batch`.
            beside: bytes that another model's cache needs, out of the same half.

        Raises:
            NotEnoughMemoryError: the config requests more than is free.
        """
        with self._making:
            if self._arena is None:
                if self.config.kv_cache_memory is not None:
                    check_granted(self.config.kv_cache_memory, self.backend.free_memory())
                    return self.arena
                self._arena = self._arena_of(for_batch(batch, self.backend.free_memory(), beside))
            return self._arena

    def _arena_of(self, size: CacheSize) -> Arena:
        check_reserved(size, self.backend.free_memory())
        backend, graph = self.backend, self.graph
        slots = size.slots(self._state_bytes)
        rest = replace(size, bytes=size.bytes - slots * self._state_bytes)
        store = backend.new_store(graph, self.kv_dtype, rest.blocks(self._block_bytes), slots)
        layers = min(graph.cache.layers, graph.hidden_states - 1)  # without those of MTP layers
        empty = 0 if graph.states else graph.hidden_states - 1 - layers
        growth = CheckedGrowth(store.block_bytes, store.num_blocks, backend.free_memory, lambda: store.held_blocks)
        state_growth = (
            CheckedGrowth(store.state_bytes, slots, backend.free_memory, lambda: store.held_states) if slots else None
        )
        return Arena(
            store, layers, _latent_row(graph), _rotation(graph), groups_of(graph), size, growth, state_growth, empty,
            graph.cache.group_of, _windows(graph),
        )  # fmt: skip

    @property
    def _state_bytes(self) -> int:
        return self.backend.state_bytes(self.graph) if self.graph.states else 0

    @property
    def _block_bytes(self) -> int:
        return self.backend.block_bytes(self.graph, self.kv_dtype)

    @property
    def cache_size(self) -> CacheSize:
        """The maximum size of the model's arena, or, if there is none yet, of the one it would get now."""
        with self._making:
            if self._arena is not None:
                return self._arena.size
            memory = self.config.kv_cache_memory
            return what_is_free(self.backend.free_memory()) if memory is None else granted(memory)

    @property
    def kv_dtype(self) -> str:
        """Storage format of the KV cache."""
        return kv_dtype(self.config, formats_of(self.model, self.graph))

    def placed(self, placement: Placement) -> None:
        """Call after the model was loaded to a device, or moved there: says where its experts are."""
        self.placement = placement if placement.why else None
        if self.placement is not None:
            _log.info("%s", placement)

    def rebind(self) -> None:
        """Discards the compiled plans; the next call compiles them from the modules' current storage."""
        self._plan = self._mtp_plans = self._adapters = None

    def replaced(self) -> None:
        """Call after packed modules were replaced by others: discards the plans, the caches and facts about the module tree."""
        self._tree.forget()
        self._arena = None
        if self._backend is not None:
            self._set_products(self._backend)
        self.rebind()

    def move(self) -> None:
        """Call after the model moved to another device: discards backend, plans and caches."""
        self._plan = self._mtp_plans = self._backend = self._arena = self._adapters = None

    def changed(self) -> str | None:
        """Why `plan` cannot serve the model's module tree; see `ModuleTree.changed`."""
        return self._tree.changed(self.model)

    def unserved(self) -> str | None:
        """Why `current_plan` cannot serve the model's module tree; None if it can."""
        with self._making:
            added = self._added()
        return added if isinstance(added, str) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        if self.config.parallel.ranks > 1:
            raise BackendError("a model in several processes cannot be copied; load it again")
        twin = super().__deepcopy__(memo)
        twin._plan = twin._mtp_plans = twin._arena = twin._adapters = None
        twin._tree = self._tree.of_copy()
        return twin


def runtime_of(model: Any) -> Runtime:
    """The runtime of an optimized model, also through a PEFT wrapper; of a multimodal model that of its language model.

    Raises:
        ConfigError: the model is not optimized.
        UnsupportedModelError: it has no plan for decoding: it is on the general path, or an encoder.
    """
    runtime = packed_model_of(model)
    runtime = getattr(runtime, "language", runtime)
    if not isinstance(runtime, Runtime):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no execution plan for decoding, which this needs: call the model, or model.generate "
            f"if it has it. The reason: {runtime.no_plan}"
        )
    return runtime


def _rotation(graph: Graph) -> KeyRotation | None:
    try:
        return key_rotation(graph)
    except UnsupportedModelError:
        return None  # code that has to move keys calls key_rotation itself and gets the error


def _latent_row(graph: Graph) -> LatentRow | None:
    node = next((node for node in graph.nodes if node.op == "latent"), None)
    if node is None:
        return None
    halves = node.attrs["interleaved"] and not FAMILIES[graph.family].interleaved_latents
    return LatentRow(node.attrs["rank"], halves)


def _windows(graph: Graph) -> tuple[WindowRows, ...]:
    """With compressed attention, the rows that each layer reads by token."""
    nodes = [node for node in graph.nodes if node.op == "compressed_attention"]
    return tuple(WindowRows(node.attrs["layer"], node.attrs["window"]) for node in nodes)


def _check_bound(model: Any, graph: Graph) -> None:
    """Checks that the graph uses every packed matrix: it would ignore a head that should be tied but is not."""
    bound = {m.data.data_ptr() for m in matrices_of(model, graph).values()}
    for name, module in model.named_modules():
        if isinstance(module, Packed) and any(w.data.data_ptr() not in bound for w in module.held().values()):
            raise ConfigError(
                f"{name}.weight is not tied to the embedding, though config.tie_word_embeddings is true; set it to false"
            )
