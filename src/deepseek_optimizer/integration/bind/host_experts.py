"""Which layers' routed experts stay in the host's memory, where the CPU computes them, if a model goes to a device.

Experts are most of such a model's weights, and few of them are used for a token. So they are what a device too small for all
weights can do without: the first layers' experts stay on the host, as many as do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...backends.base import BLOCK_TOKENS, Backend, CompileOptions
from ...backends.registry import choose_backend, find
from ...config import DeepSeekConfig
from ...errors import BackendError, ConfigError
from ...system.memory import less_reserve, mb
from ..memory.cache_size import SLOTS_PER_SEQUENCE
from ..memory.weights import check_memory
from .graphs import planned_graph, planned_module
from .packed_experts import PackedExperts
from .runnable import formats_of, kv_dtype
from .swap import expected_tensors, matrices_of

CONTEXT = 8192  # tokens of a sequence for whose cache room is left, unless `kv_cache_memory` is set
_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Placement:
    """Where the routed experts of a model are.

    Attributes:
        layers: that have experts.
        on_host: number of them whose experts the CPU computes, the first ones.
        why: the reason, in words; "" if there was nothing to decide.
    """

    layers: tuple[PackedExperts, ...]
    on_host: int
    why: str

    def __str__(self) -> str:
        if not self.layers:
            return ""
        count = len(self.layers)
        which = f"the first {self.on_host} of {count}" if 0 < self.on_host < count else f"all {count}"
        where = "run on the CPU, from the host's memory" if self.on_host else "run on the device"
        return f"the experts of {which} layers {where}" + (f": {self.why}" if self.why else "")

    def mark(self) -> None:
        """Tells the modules, before weights are loaded or moved. Those that are to stay on the host come back from a device."""
        for index, module in enumerate(self.layers):
            module.on_host = index < self.on_host
            for name in _STACKS if module.on_host else ():
                parameter = module._parameters[name]
                if parameter is not None and parameter.device.type not in ("cpu", "meta"):
                    parameter.data = parameter.data.cpu()


def host_experts(model: Any) -> tuple[str, ...]:
    """`CompileOptions.host_experts` of a model."""
    return tuple(f"{name}.gate_up_proj" for name, module in model.named_modules() if _is_on_host(module))


def stays_on_host(model: Any, name: str) -> bool:
    """Whether a parameter of a model stays in the host's memory when the model goes to a device."""
    path, _, leaf = name.rpartition(".")
    return leaf in _STACKS and _is_on_host(model.get_submodule(path))


def all_together(model: Any) -> Placement:
    """The placement of a model whose weights are all on its device."""
    return Placement(_layers(model), 0, "")


def _layers(model: Any) -> tuple[PackedExperts, ...]:
    return tuple(module for module in model.modules() if isinstance(module, PackedExperts))


def place_experts(model: Any, config: DeepSeekConfig, device: torch.device, mapped: bool = False) -> Placement:
    """Decides where the experts of a model are, and checks that its weights fit there. Nothing is changed.

    Args:
        model: the whole model, with packed modules, which may be on the meta device.
        config: the settings.
        device: where the model is going to be.
        mapped: whether weights on the host are mapped from a file, and take no memory of their own.

    Raises:
        ConfigError: the settings keep experts on the CPU, and the backend of the device cannot; or experts are to be there, and
            `activation="fp8"` is set.
        BackendError: they do, and there is no backend for the CPU.
        NotEnoughMemoryError: the weights do not fit.
    """
    layers = _layers(model)
    wanted = config.cpu_expert_layers
    backend = None if device.type == "cpu" else choose_backend(config, device)[0]
    if backend is None or not layers or not backend.capabilities.host_experts:
        if wanted and layers and backend is not None:
            raise ConfigError(
                f"cpu_expert_layers={wanted}: the {backend.name} backend has no experts on the CPU; leave it out, or use "
                'backend="cuda"'
            )
        placement = Placement(layers, 0, "")
    else:
        missing = find("cpu").unavailable_reason(config)
        if wanted and missing is not None:
            raise BackendError(f"cpu_expert_layers={wanted}: {missing}")
        if wanted is not None:
            placement = Placement(layers, min(wanted, len(layers)), f"cpu_expert_layers={wanted}")
        else:
            placement = _fitting(model, config, backend, layers, missing)
    if placement.on_host and config.activation == "fp8":
        raise ConfigError(
            f'activation="fp8": {placement}; the CPU does not round rows to FP8. Use activation="auto", or cpu_expert_layers=0'
        )
    _check(model, config, device, placement, mapped)
    return placement


def _fitting(
    model: Any, config: DeepSeekConfig, backend: Backend, layers: tuple[PackedExperts, ...], missing: str | None
) -> Placement:
    """As many layers' experts as possible on the device."""
    free, sizes = backend.free_memory(), [sum(weight.nbytes for weight in module.held().values()) for module in layers]
    rest = sum(tensor.nbytes for tensor in _tensors(model)) - sum(sizes)
    beside = rest + _working_memory(model, config, backend)
    room, on_host = less_reserve(free.free) - beside, 0
    while on_host < len(layers) and sum(sizes[on_host:]) > room:
        on_host += 1
    if on_host == 0:
        return Placement(layers, 0, f"they fit in the {mb(free.free)} that are free")
    if missing is not None:
        return Placement(layers, 0, f"{missing}")
    why = (
        f"of {mb(sum(sizes))} of experts, {mb(max(0, room))} fit in the {mb(free.free)} that are free on {backend.device}, "
        f"beside {mb(beside)} of other weights, cache and buffers; cpu_expert_layers sets another number"
    )
    return Placement(layers, on_host, why)


def _working_memory(model: Any, config: DeepSeekConfig, backend: Backend) -> int:
    """Bytes of the cache, and of a plan's buffers with all experts on the device."""
    planned = planned_module(model)
    graph, _, _ = planned_graph(planned, config)
    formats = {name: weight.format for name, weight in matrices_of(planned, graph).items()}
    high = config.batch_size_range[1]
    buffers = backend.buffer_bytes(graph, formats, CompileOptions(config.activation), max(config.prefill_chunk, high), high)
    if config.kv_cache_memory is not None:
        return buffers + config.kv_cache_memory
    blocks = graph.cache.groups * -(-min(CONTEXT, graph.max_positions) // BLOCK_TOKENS)
    states = SLOTS_PER_SEQUENCE * backend.state_bytes(graph) if graph.states else 0
    return buffers + states + blocks * backend.block_bytes(graph, kv_dtype(config, formats_of(planned, graph)))


def _check(model: Any, config: DeepSeekConfig, device: torch.device, placement: Placement, mapped: bool) -> None:
    """Checks that the weights fit on both sides."""
    if placement.on_host == 0:
        if not (mapped and device.type == "cpu"):
            check_memory(_tensors(model), device, config.kv_cache_memory)
        return
    staying = {id(module._parameters[name]) for module in placement.layers[: placement.on_host] for name in _STACKS}
    check_memory((each for each in _tensors(model) if id(each) not in staying), device, config.kv_cache_memory)
    if not mapped:
        check_memory(each for each in _tensors(model) if id(each) in staying and not _is_resident(each))


def _is_resident(tensor: torch.Tensor) -> bool:
    """Whether a tensor takes memory of the host already."""
    return tensor.device.type == "cpu"


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    """A model's weights, tied ones once."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return (own[name] for name in expected_tensors(model)[0])


def _is_on_host(module: Any) -> bool:
    return isinstance(module, PackedExperts) and module.on_host
