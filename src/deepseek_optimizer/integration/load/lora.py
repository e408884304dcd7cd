"""A PEFT LoRA adapter for the products of a model's graph: its modules are found by the names that the loader knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...checkpoint.language_part import language_names
from ...checkpoint.lora import LoraFile, StoredPair, digest_of
from ...checkpoint.lora_config import MERGE
from ...checkpoint.published_names import parameter_name
from ...engine.adapters import AdapterWeights
from ...errors import AdapterError, shown
from ...graph.ir import Graph
from ..bind.lora_layers import pair_of_site


def read_adapter(
    path: str | Path, graph: Graph, max_rank: int, check_size: Callable[[Mapping[int, int]], None] = lambda _: None
) -> AdapterWeights:
    """Reads an adapter. All shapes are checked before tensors are read.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        graph: with adapter sites.
        max_rank: largest rank that is allowed.
        check_size: called with the rank of each site before tensors are read; raises an error if there is no memory for them.

    Raises:
        CheckpointError: a file is missing or damaged.
        AdapterError: the adapter has a feature that is not supported, or belongs to another model.
    """
    file = LoraFile(Path(path))
    try:
        sites = _sites_by_module(graph)
        places = {module: _place(file, module, pair, graph, sites, max_rank) for module, pair in file.pairs.items()}
        if not places:
            raise AdapterError("contains no LoRA matrices", path=file.path)
        check_size({site: file.pairs[module].rank for module, found in places.items() for site in found})
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module, found in places.items():
            down, up = file.read(module)
            pairs |= {site: pair_of_site(graph.adapter_sites[site], down, up) for site in found}
        file.check_unchanged()
        return AdapterWeights(pairs, max(pair.rank for pair in file.pairs.values()), digest_of(pairs))
    finally:
        file.close()


def _sites_by_module(graph: Graph) -> dict[str, list[int]]:
    sites: dict[str, list[int]] = {}
    for index, site in enumerate(graph.adapter_sites):
        sites.setdefault(site.module, []).append(index)
    return sites


def _place(
    file: LoraFile, module: str, pair: StoredPair, graph: Graph, sites: Mapping[str, list[int]], max_rank: int
) -> list[int]:
    """The sites of a module. Raises AdapterError if it has none, or the matrices do not fit."""
    found = next((sites[name] for name in _names(module, graph.family) if name in sites), None)
    if found is None:
        known = any(name in _modules(graph) for name in _names(module, graph.family))
        missing = "the model has no such module; load it with the model it was trained on"
        what = f"this kind of module is not supported; {MERGE}" if known else missing
        raise AdapterError(f"adapts {shown(module)}, but {what}", path=file.path)
    if pair.rank > max_rank:
        raise AdapterError(
            f"has rank {pair.rank} for {shown(module)}, more than max_lora_rank {max_rank}; raise it (--max-lora-rank)",
            path=file.path,
        )
    outputs, inputs = graph.adapter_sites[found[0]].module_shape
    if (pair.inputs, pair.outputs) != (inputs, outputs):
        raise AdapterError(
            f"has matrices for {shown(module)} with {pair.inputs} inputs and {pair.outputs} outputs, but the module has "
            f"{inputs} and {outputs}: the adapter belongs to another model",
            path=file.path,
        )
    return found


def _names(module: str, family: str) -> list[str]:
    """The paths that a module of an adapter may have in the model."""
    names = [name.removesuffix(".weight") for name in language_names(f"{module}.weight", family)]
    return [parameter_name(f"{name}.weight", family).removesuffix(".weight") for name in names]


def _modules(graph: Graph) -> set[str]:
    """Paths of all modules with weights, and of those that contain them."""
    modules = {"lm_head"}  # also if it shares the embedding's weight
    for weight in graph.weights():
        path = weight
        while path:
            path = path.rpartition(".")[0]
            modules.add(path)
    return modules
