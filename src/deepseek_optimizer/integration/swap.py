"""Putting packed modules where Transformers' own stand, and reading a model's weights as a plan wants them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import DeepSeekConfig
from ..errors import BackendError, ConfigError, UnsupportedModelError
from ..graph.ir import Graph
from ..quant import PackedMatrix, Packer, get_format
from .modules import Packed, PackedEmbedding, PackedLinear


@dataclass(frozen=True)
class Site:
    """A module whose weight is a matrix of the graph. `weight`: the parameter's name, after tying."""

    name: str
    parent: nn.Module
    child: str
    module: nn.Module
    weight: str


def sites(model: nn.Module, graph: Graph) -> list[Site]:
    """Every linear and embedding module that holds a matrix of `graph`; a tied module is named with its source's weight."""
    wanted = set(graph.weights())
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found = []
    for name, module in model.named_modules():
        weight = tied.get(f"{name}.weight", f"{name}.weight")
        if weight in wanted and isinstance(module, (nn.Linear, nn.Embedding)):
            if type(module) not in (nn.Linear, nn.Embedding, *Packed):
                raise UnsupportedModelError(
                    f"{name} is a {type(module).__name__}, which cannot be packed; load the model without other quantisers "
                    "or adapters"
                )
            parent, _, child = name.rpartition(".")
            found.append(Site(name, model.get_submodule(parent), child, module, weight))
    return found


def _named_sites(model: nn.Module, graph: Graph, config: DeepSeekConfig) -> list[Site]:
    """The sites, once every module that `config.formats` names is found to be one."""
    found = sites(model, graph)
    names = dict.fromkeys(site.weight.removesuffix(".weight") for site in found)
    for name in config.formats or ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"formats names {name!r}, which is no matrix of this model{hint}")
    return found


def packed_twin(module: nn.Module, format_name: str, dtype: torch.dtype) -> PackedLinear | PackedEmbedding:
    """An empty packed module for a float one, on the meta device. Biases are the float module's own."""
    get_format(format_name)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(
            module.num_embeddings, module.embedding_dim, format_name, padding_idx=module.padding_idx, dtype=dtype, device="meta"
        )
    assert isinstance(module, nn.Linear)
    twin = PackedLinear(module.in_features, module.out_features, format_name, dtype=dtype, device="meta")
    twin.bias = module.bias
    return twin


NATURAL = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp32"}  # what keeps a float matrix as it is


def swap_on_meta(
    model: Any, graph: Graph, config: DeepSeekConfig, dtype: torch.dtype, natural: Callable[[str], str] | None = None
) -> None:
    """Puts empty packed modules in place before weights are loaded, tied ones sharing one parameter.

    Args:
        natural: a weight's name -> the format that keeps it as it is stored; None: that of `dtype`.
    """
    first: dict[str, nn.Parameter] = {}
    for site in _named_sites(model, graph, config):
        own = NATURAL[dtype] if natural is None else natural(site.weight)
        twin = packed_twin(site.module, config.format_of(site.weight, own), dtype)
        twin.weight = first.setdefault(site.weight, twin.weight)
        setattr(site.parent, site.child, twin)


def pack_in_place(model: Any, graph: Graph, config: DeepSeekConfig, packer: Packer) -> None:
    """Converts a loaded float model module by module; each original's memory is free before the next is packed."""
    done: dict[str, nn.Parameter] = {}
    for site in _named_sites(model, graph, config):
        if isinstance(site.module, Packed):
            continue
        module = site.module
        dtype: Any = module.weight.dtype
        format_name = config.format_of(site.weight, NATURAL[dtype])
        twin = packed_twin(module, format_name, dtype)
        if site.weight not in done:
            tiles = packer(module.weight.data, format_name)  # type: ignore[arg-type]
            done[site.weight] = nn.Parameter(tiles, requires_grad=False)
        twin.weight = done[site.weight]
        twin.training = module.training
        setattr(site.parent, site.child, twin)
        module._parameters.clear()  # whoever still holds the module must not hold its weights
        del module, site


def expected_tensors(model: Any) -> tuple[dict[str, str | None], dict[str, tuple[int, ...]]]:
    """What a checkpoint must hold for a swapped model, tied parameters once: formats (None for plain tensors), and shapes."""
    tied = model.all_tied_weights_keys or {}
    formats: dict[str, str | None] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        is_matrix = isinstance(module, Packed) and name.endswith(".weight")
        formats[name] = module.format if is_matrix else None
        shapes[name] = (module.packed.rows, module.packed.cols) if is_matrix else tuple(parameter.shape)
    return formats, shapes


def weights_of(model: nn.Module, graph: Graph) -> dict[str, PackedMatrix | torch.Tensor]:
    """What a backend compiles with: matrices packed, vectors as they are. The storage is the modules' own."""
    found: dict[str, PackedMatrix | torch.Tensor] = {}
    for name in graph.weights():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute == "weight" and isinstance(module, Packed):
            found[name] = module.packed
        else:
            found[name] = getattr(module, attribute).data
        held = found[name]
        if (held.data if isinstance(held, PackedMatrix) else held).device.type == "meta":
            raise BackendError(f"{name} has no data yet: bind the plan after loading the weights")
    return found


def matrices_of(model: nn.Module, graph: Graph) -> dict[str, PackedMatrix]:
    """The packed matrices by parameter name, tied ones once."""
    return {name: w for name, w in weights_of(model, graph).items() if isinstance(w, PackedMatrix)}
