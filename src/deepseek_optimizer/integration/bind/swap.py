"""Replaces Transformers' modules by packed ones, and collects a model's weights for a plan."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...checkpoint.stacks import merged_shape
from ...config import DeepSeekConfig
from ...errors import BackendError, ConfigError, UnsupportedModelError
from ...graph.analysis import stack_shapes
from ...graph.ir import Graph
from ...graph.min_formats import exact_weights, min_formats
from ...quant import ColumnOrder, PackedMatrix, PackedStack, PackedWeight, Packer, get_format
from ...quant.overflow import overflow_of
from ...quant.tiles import empty_stack
from ...quant.transposed_stack import StackLayout, stacked_matrices
from .lora_layers import without_adapter
from .modules import Packed, PackedEmbedding, PackedGroupedLinear, PackedLinear
from .packed_experts import ClampedSwiglu, PackedExperts, PackedWeighedExperts

STACKS = ("gate_up_proj", "down_proj")  # parameters of Transformers' modules of experts
_WITH_BIASES = tuple(f"{stack}{suffix}" for stack in STACKS for suffix in ("", "_bias"))


@dataclass(frozen=True)
class Site:
    """A module that holds matrices of the graph. `weights`: parameter name in the module -> name in the model, after tying."""

    name: str
    parent: nn.Module
    child: str
    module: nn.Module
    weights: Mapping[str, str]


def sites(model: nn.Module, graph: Graph) -> list[Site]:
    """Every linear, embedding and experts module with weights of `graph` that may be packed. A tied weight has the name of the
    one it is tied to.

    Raises:
        UnsupportedModelError: such a module has a type that cannot be packed.
    """
    wanted = set(graph.weights()) - exact_weights(graph)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    result = []
    for name, module in model.named_modules():
        names = {leaf: tied.get(f"{name}.{leaf}", f"{name}.{leaf}") for leaf in ("weight", *STACKS)}
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weights = {"weight": names["weight"]} if names["weight"] in wanted else {}
            plain = type(module) in (nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding)
            scaled = isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")
            supported = plain or scaled or hasattr(module, "n_groups")
        else:
            weights = {leaf: names[leaf] for leaf in STACKS if names[leaf] in wanted}
            supported = isinstance(module, PackedExperts) or tuple(module._parameters) in (STACKS, _WITH_BIASES)
        if weights:
            if not supported:
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__}, which cannot be packed; load the model without other quantizers "
                    "or adapters"
                )
            parent, _, child = name.rpartition(".")
            result.append(Site(name, model.get_submodule(parent), child, module, weights))
    return result


def _named_sites(model: nn.Module, graph: Graph, config: DeepSeekConfig) -> list[Site]:
    """The sites, after checking that every entry of `config.formats` names one of their matrices."""
    result = sites(model, graph)
    names = dict.fromkeys(weight.removesuffix(".weight") for site in result for weight in site.weights.values())
    for entry in config.unmatched(names):
        if entry not in config.unmatched([weight.removesuffix(".weight") for weight in exact_weights(graph)]):
            raise ConfigError(f"formats names {entry!r}, which always stays in its stored precision; leave it out")
        near = difflib.get_close_matches(entry, names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"formats names {entry!r}, which is not a matrix of this model{hint}")
    return result


def packed_twin(module: nn.Module, formats: Mapping[str, str], dtype: torch.dtype) -> Packed:
    """An empty packed module on the meta device that can replace `module`; it shares the biases.

    Args:
        module: a linear, embedding or experts module, float or packed.
        formats: weight format by parameter name in the module.
        dtype: floating point type of the surrounding model.
    """
    for name in formats.values():
        get_format(name)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            formats["weight"],
            padding_idx=module.padding_idx,
            scale=float(getattr(module, "scalar_embed_scale", getattr(module, "scale", 1.0))),
            dtype=dtype,
            device="meta",
        )
    if isinstance(module, nn.Linear):
        kind, groups = (PackedGroupedLinear, module.n_groups) if hasattr(module, "n_groups") else (PackedLinear, None)
        twin = kind(module.in_features, module.out_features, formats["weight"], dtype=dtype, device="meta")
        if groups is not None:
            twin.n_groups = groups
        twin.bias = module.bias
        return twin
    return _packed_experts(module, formats, dtype)


def _packed_experts(experts: Any, formats: Mapping[str, str], dtype: torch.dtype) -> PackedExperts:
    clamped = hasattr(experts, "alpha") and hasattr(experts, "limit")  # GptOssExperts
    weighed = not clamped and hasattr(experts, "hidden_size")  # Llama4TextExperts
    hidden, inner = ("hidden_size", "intermediate_size") if clamped or weighed else ("hidden_dim", "intermediate_dim")
    layout: StackLayout = "columns" if weighed else "interleaved" if clamped else "rows"
    kind = type(experts) if isinstance(experts, PackedExperts) else PackedWeighedExperts if weighed else PackedExperts
    twin = kind(
        experts.num_experts,
        getattr(experts, hidden),
        getattr(experts, inner),
        *(formats[leaf] for leaf in STACKS),
        act_fn=_activation(experts),
        dtype=dtype,
        device="meta",
        layout=experts.layout if isinstance(experts, PackedExperts) else layout,
    )
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        setattr(twin, name, getattr(experts, name, None))
    return twin


def _activation(experts: Any) -> Any:
    """`act_fn` of the packed experts that replace these."""
    if isinstance(experts, PackedExperts) or not hasattr(experts, "limit"):
        return experts.act_fn
    if hasattr(experts, "alpha"):  # GptOssExperts
        return ClampedSwiglu(experts.alpha, experts.limit)
    return ClampedSwiglu(1.0, experts.limit, raised=False)  # DeepseekV4Experts


NATURAL = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp32"}  # lossless formats


def swap_on_meta(
    model: Any,
    graph: Graph,
    config: DeepSeekConfig,
    dtype: torch.dtype,
    natural: Callable[[str, tuple[int, ...]], str] | None = None,
    packed: Mapping[str, str] | None = None,
) -> None:
    """Replaces modules by empty packed ones before weights are loaded; tied weights share a parameter.

    Args:
        natural: returns the lossless format of a stored weight, given its name and shape; None: that of `dtype`.
        packed: formats in a packed checkpoint, by module name; they override the config's.

    Raises:
        ConfigError: `config.formats` names something that is not a packable matrix of the model.
    """
    stacks, minimum = stack_shapes(graph), min_formats(graph)
    first: dict[str, nn.Parameter] = {}
    for site in _named_sites(model, graph, config):
        formats = {}
        for leaf, weight in site.weights.items():
            shape = stacks.get(weight) or tuple(getattr(site.module, leaf).shape)
            own = NATURAL[dtype] if natural is None else natural(weight, shape)
            formats[leaf] = _format_of(weight, config, own, minimum, packed)
        twin = packed_twin(site.module, formats, dtype)
        for leaf, weight in site.weights.items():
            setattr(twin, leaf, first.setdefault(weight, getattr(twin, leaf)))
        setattr(site.parent, site.child, twin)


def order_columns(model: nn.Module, order: Callable[[str, str], ColumnOrder | None]) -> None:
    """Sets the order of the columns of packed matrices.

    Args:
        order: returns it, given the weight's name and format.

    Raises:
        ConfigError: there is one for a matrix that is no linear layer's.
    """
    for name, module in model.named_modules():
        if not isinstance(module, (PackedLinear, PackedEmbedding)):
            continue
        found = order(f"{name}.weight", module.format)
        if type(module) is PackedLinear:
            module.order = found
        elif found is not None:
            raise ConfigError(
                f"{name} has a column_order in config.json, which only a linear layer can have; convert the original again"
            )


def pack_in_place(
    model: Any, graph: Graph, config: DeepSeekConfig, packer: Packer, packed: Mapping[str, str] | None = None
) -> None:
    """Packs a loaded float model module by module; the memory of each original is freed before the next is packed.

    Args:
        packed: formats of modules that were packed before, by module name; they override the config's.

    Raises:
        ConfigError: as in `swap_on_meta`.
    """
    minimum = min_formats(graph)
    done: dict[str, nn.Parameter] = {}
    for site in _named_sites(model, graph, config):
        if isinstance(site.module, Packed):
            continue
        module = site.module
        dtype: Any = next(iter(module._parameters.values())).dtype  # type: ignore[union-attr]  # they have weights
        formats = {leaf: _format_of(w, config, NATURAL[dtype], minimum, packed) for leaf, w in site.weights.items()}
        twin = packed_twin(module, formats, dtype)
        for leaf, weight in site.weights.items():
            if weight not in done:
                tiles = packed_tiles(weight, getattr(module, leaf).data, twin.held()[leaf], packer, twin.layout)
                done[weight] = nn.Parameter(tiles, requires_grad=False)
                del module._parameters[leaf]  # frees the weights even if something still refers to the module
            setattr(twin, leaf, done[weight])
        twin.training = module.training
        setattr(site.parent, site.child, twin)
        module._parameters.clear()
        del module, site


def put_in_place(places: Iterable[Site], matrices: Mapping[str, PackedWeight]) -> None:
    """Replaces packed modules by such with other matrices, given by name; tied weights share a parameter again.

    Modules whose matrices all keep their formats stay.
    """
    parameters: dict[str, nn.Parameter] = {}
    for site in places:
        module: Any = site.module
        formats = {leaf: matrices[weight].format for leaf, weight in site.weights.items()}
        if all(held.format == formats[leaf] for leaf, held in module.held().items()):
            continue
        twin = packed_twin(module, formats, module.dtype)
        for leaf, weight in site.weights.items():
            setattr(twin, leaf, parameters.setdefault(weight, nn.Parameter(matrices[weight].data, requires_grad=False)))
        if isinstance(twin, PackedLinear):
            twin.order = matrices[site.weights["weight"]].order  # type: ignore[union-attr]  # a matrix
        twin.training = module.training
        setattr(site.parent, site.child, twin)


def planned_twins(model: Any, graph: Graph, config: DeepSeekConfig) -> Iterator[tuple[Site, Packed]]:
    """Each module of a float model that `pack_in_place` would replace, with the empty packed module that would replace it.

    Raises:
        ConfigError: as in `swap_on_meta`.
    """
    minimum = min_formats(graph)
    for site in _named_sites(model, graph, config):
        dtype = next(site.module.parameters(recurse=False)).dtype
        formats = {leaf: _format_of(w, config, NATURAL[dtype], minimum, None) for leaf, w in site.weights.items()}
        yield site, packed_twin(site.module, formats, dtype)


def substitute(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module wherever the model refers to it: some share one among several parents."""
    new.training = old.training
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def _format_of(
    weight: str, config: DeepSeekConfig, natural: str, minimum: Mapping[str, str], packed: Mapping[str, str] | None
) -> str:
    given = (packed or {}).get(weight.removesuffix(".weight"))
    return config.format_of(weight, natural, minimum.get(weight)) if given is None else given


def packed_tiles(
    name: str, weight: torch.Tensor, like: PackedWeight, packer: Packer, layout: StackLayout = "rows"
) -> torch.Tensor:
    """The tiles of a float matrix, or of a merged float parameter of experts, packed matrix by matrix.

    Args:
        name: of the weight.
        weight: the matrix, or the parameter.
        like: a weight of the same shape and of the format to pack in.
        packer: packs a matrix.
        layout: of the parameter of a stack, see `quant/transposed_stack.py`.

    Raises:
        ConfigError: a weight is too large for the format.
    """
    if isinstance(like, PackedMatrix):
        return matrix_tiles(name, weight, like.format, packer)
    out = empty_stack(*like.shape, get_format(like.format).tile_bytes)
    for matrix, tiles in zip(stacked_matrices(weight, like.shape, layout), out, strict=True):
        matrix_tiles(name, matrix, like.format, packer, tiles)
    return out


def matrix_tiles(name: str, matrix: torch.Tensor, format: str, packer: Packer, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tiles of a float matrix, written to `out` if it is given.

    Raises:
        ConfigError: a weight is too large for the format; it names `name`.
    """
    tiles = packer(matrix, format, out)
    if (problem := overflow_of(matrix, tiles, format)) is not None:
        raise ConfigError(f"{name} {problem}")
    return tiles


def float_shape(leaf: str, weight: PackedWeight, layout: StackLayout = "rows") -> tuple[int, ...]:
    """The shape of the float parameter `leaf` that this packed matrix or stack replaces; `layout`: as in `packed_tiles`."""
    if not isinstance(weight, PackedStack):
        return weight.shape
    experts, rows, cols = merged_shape(leaf, weight.shape)
    return (experts, rows, cols) if layout == "rows" else (experts, cols, rows)


def expected_tensors(model: Any) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]]]:
    """The tensors that a checkpoint must contain for a model with packed modules, tied ones once.

    Returns: format by name (None for plain tensors), and shape by name (of a stack: count, rows, cols).
    """
    tied = model.all_tied_weights_keys or {}
    formats: dict[str, str | None] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        held = module.held() if isinstance(module, Packed) else {}
        lasting = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for leaf, tensor in (*module._parameters.items(), *lasting.items()):
            name = f"{path}.{leaf}" if path else leaf
            if tensor is not None and name not in tied:
                formats[name] = held[leaf].format if leaf in held else None
                shapes[name] = held[leaf].shape if leaf in held else tuple(tensor.shape)
    return formats, shapes


def stored_tensors(model: Any) -> dict[str, PackedWeight | torch.Tensor]:
    """The tensors of a checkpoint of this model by name: packed weights, and plain tensors for the rest; tied ones once."""
    result: dict[str, PackedWeight | torch.Tensor] = {}
    for name in expected_tensors(model)[0]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = module.held() if isinstance(module, Packed) else {}
        result[name] = held[leaf] if leaf in held else getattr(module, leaf).data
    return result


def weights_of(model: nn.Module, graph: Graph, names: Iterable[str] | None = None) -> dict[str, PackedWeight | torch.Tensor]:
    """The graph's weights by name, for a backend to compile with: packed matrices and plain vectors, in the modules' storage.

    Args:
        model: has them.
        graph: the graph.
        names: the weights; None: all.

    Raises:
        BackendError: a weight is not loaded yet.
    """
    result = _held_by_modules(model, graph.weights() if names is None else names)
    for name, weight in result.items():
        if (weight.data if isinstance(weight, PackedWeight) else weight).device.type == "meta":
            raise BackendError(f"{name} has no data yet; bind the plan after loading the weights")
    return result


def matrices_of(model: nn.Module, graph: Graph) -> dict[str, PackedWeight]:
    """The graph's packed matrices and stacks by parameter name, tied ones once."""
    return {name: w for name, w in _held_by_modules(model, graph.weights()).items() if isinstance(w, PackedWeight)}


def _held_by_modules(model: nn.Module, names: Iterable[str]) -> dict[str, PackedWeight | torch.Tensor]:
    result: dict[str, PackedWeight | torch.Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = without_adapter(model.get_submodule(path))
        held = module.held() if isinstance(module, Packed) else {}
        result[name] = held[leaf] if leaf in held else getattr(module, leaf).data
    return result
