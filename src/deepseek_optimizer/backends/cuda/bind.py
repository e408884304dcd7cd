"""A graph's weights on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import BackendError
from ...graph.analysis import stack_shapes, weight_shapes
from ...graph.ir import Graph, Node
from ...graph.min_formats import exact_weights
from ...quant import pack
from ...quant.packed import PackedMatrix, PackedWeight
from ...quant.transposed_stack import biases_of
from ..kv_b import key_stack, value_stack
from .alternative import Chosen
from .division import DEFAULT, Division
from .kv_b import absorbed_stacks, grouped_stack
from .matrices import DeviceMatrix, DeviceStack
from .ops import Weights, frequencies_name, ropes
from .supported import check_matrix, check_stack

EXPERT_PRODUCTS = ("experts_gate_up", "experts_down")


def weights_on_device(
    graph: Graph,
    weights: Mapping[str, PackedWeight | torch.Tensor],
    device: torch.device,
    division: Division = DEFAULT,
    coded: bool = False,
    alternatives: tuple[Chosen, ...] = (),
) -> Weights:
    """Copies a graph's weights: matrices and stacks as they are packed, once for tied names, and vectors as float32. Matrices
    that stay floats, such as routers', are packed as fp32; of latent attention's, the stacks of `kv_b` are copied instead.

    Args:
        coded: as of `DeviceMatrix`.
        alternatives: that products of many rows may use.

    Raises:
        BackendError: a weight is missing or does not fit.
    """
    bound = Weights({}, {}, {})
    stacks, exact = stack_shapes(graph), exact_weights(graph)
    biases = {name: node for node in graph.nodes if node.op in EXPERT_PRODUCTS for name in node.attrs.get("biases", ()) if name}
    latent = {node.weights[0]: node.attrs for node in graph.nodes if node.op == "mla_attention"}
    grouped = {
        node.weights[0]: node.attrs["groups"]
        for node in graph.nodes
        if node.op == "grouped_linear" and not node.attrs.get("shared", False)
    }
    tables = {node.weights[1] for node in graph.nodes if node.op == "hash_router"}
    floats = {node.weights[0] for node in graph.nodes if node.op == "compress"}  # biases of several tokens
    floats |= {name for node in graph.nodes if node.op == "grid_queries" for name in node.weights}
    copies: dict[int, tuple[torch.Tensor, DeviceMatrix]] = {}  # by id of the tensor, which is kept alive
    for name, shape in weight_shapes(graph).items():
        weight = weights.get(name)
        if name in stacks:
            stack = check_stack(name, weight)
            _check_shape(name, stack.shape, stacks[name])
            bound.stacks[name] = DeviceStack(stack, device, coded)
        elif name in biases:
            bound.vectors[name] = _ordered_biases(_vector(name, weight, shape), biases[name], device)
        elif name in tables:
            bound.vectors[name] = _vector(name, weight, shape).to(device, torch.int32).contiguous()
        elif len(shape) == 2 and name not in floats:
            if name in exact and isinstance(weight, torch.Tensor):
                weight = pack(weight.detach().float(), "fp32")
            matrix = check_matrix(name, weight, graph.family)
            _check_shape(name, matrix.shape, shape)
            if name in latent:
                _add_absorbed(bound, name, matrix, latent[name], device)
            elif name in grouped:
                bound.stacks[name] = DeviceStack(grouped_stack(matrix, grouped[name]), device, coded)
            else:
                key = id(matrix.data)
                if key not in copies:
                    copies[key] = matrix.data, DeviceMatrix(matrix, device, coded)
                bound.matrices[name] = copies[key][1]
        else:
            bound.vectors[name] = _vector(name, weight, shape).to(device, torch.float32).contiguous()
    for tiles in (*bound.matrices.values(), *bound.stacks.values()):
        tiles.division = division
    for device_matrix in bound.matrices.values():
        device_matrix.alternatives = alternatives
    for spec in ropes(graph):
        if not spec.is_dynamic:
            frequencies = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
            bound.vectors[frequencies_name(spec)] = frequencies[None].contiguous()
        if spec.axes:
            bound.axes[frequencies_name(spec)] = torch.tensor(spec.axes, dtype=torch.int32, device=device)
    return bound


def _vector(name: str, weight: object, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor):
        raise BackendError(f"the graph needs weight {name!r} as a vector, got {type(weight).__name__}")
    _check_shape(name, tuple(weight.shape), shape)
    return weight.detach()


def _ordered_biases(biases: torch.Tensor, node: Node, device: torch.device) -> torch.Tensor:
    """Biases of experts in the order of their packed stack: float32 [experts, matrices, rows]."""
    if node.attrs.get("layout", "rows") != "rows":
        biases = biases_of(biases, node.outputs[0].width).flatten(1)
    return biases.to(device, torch.float32).contiguous()


def _add_absorbed(bound: Weights, name: str, kv_b: PackedMatrix, sizes: Mapping[str, int], device: torch.device) -> None:
    keys, values = absorbed_stacks(kv_b, sizes["heads"], sizes["nope"], sizes["v_dim"])
    bound.stacks[key_stack(name)], bound.stacks[value_stack(name)] = DeviceStack(keys, device), DeviceStack(values, device)


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BackendError(f"weight {name!r} has shape {found}, but the graph needs {wanted}")
