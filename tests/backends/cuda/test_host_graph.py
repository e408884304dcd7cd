"""Graphs that are divided between the device and the host. No Triton is needed."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cuda.host_graph import divide
from deepseek_optimizer.backends.cuda.sizes import CudaSizes
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import Node, Value
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support import family_configs as configs


def graph_of(config):
    return rules.apply(build_graph(config))[0]


def stacks(graph):
    return [node.weights[0] for node in graph.nodes if node.op == "experts_gate_up"]


def test_the_device_computes_shared_experts_while_the_host_computes():
    graph = graph_of(configs.deepseek_v3(num_hidden_layers=3, first_k_dense_replace=1))
    _, second = stacks(graph)
    device, (layer,) = divide(graph, [second])
    ops = [node.op for node in device.nodes]
    sent = ops.index("experts_send")
    assert ops[sent - 1 : sent + 5] == ["router", "experts_send", "gate_up", "linear", "experts_receive", "add"]
    assert ops.count("experts_gate_up") == ops.count("experts_down") == 1 and stacks(device) == [stacks(graph)[0]]
    check_graph(layer.graph)
    assert layer.weight == second and stacks(layer.graph) == [second]
    assert {node.op for node in layer.graph.nodes} == {
        "state_in", "columns", "experts_gate_up", "experts_down", "concat", "hidden_out",
    }  # fmt: skip
    assert set(device.weights()).isdisjoint(layer.graph.weights())
    assert set(device.weights()) | set(layer.graph.weights()) == set(graph.weights())


def test_without_shared_experts_the_device_waits_at_once():
    graph = graph_of(configs.qwen3_moe(num_hidden_layers=2))
    device, layers = divide(graph, stacks(graph))
    ops = [node.op for node in device.nodes]
    assert [ops[i + 1] for i, op in enumerate(ops) if op == "experts_send"] == ["experts_receive"] * 2
    assert [layer.weight for layer in layers] == stacks(graph)


def test_graphs_without_such_weights_are_unchanged():
    graph = graph_of(configs.qwen3_moe(num_hidden_layers=1))
    for names in ((), ("model.layers.7.mlp.experts.gate_up_proj",)):
        assert divide(graph, names) == (graph, ())


def test_results_that_others_read_are_refused():
    graph = graph_of(configs.qwen3_moe(num_hidden_layers=1))
    between = next(node.outputs[0] for node in graph.nodes if node.op == "experts_gate_up")
    graph.nodes.append(Node("relu", (between,), (Value("r", between.width, repeat=between.repeat),)))
    with pytest.raises(BackendError, match="the experts of .*gate_up_proj' cannot run on the CPU: 2 nodes read"):
        divide(graph, stacks(graph))


def test_sizes_are_those_of_the_devices_part():
    """The buffers of what the host computes are not on the device."""
    graph = graph_of(configs.qwen3_moe(num_hidden_layers=2))
    formats = dict.fromkeys(graph.weights(), "bf16")
    whole, divided = (
        CudaSizes().buffer_bytes(graph, formats, CompileOptions(host_experts=names), 512, 4) for names in ((), stacks(graph))
    )
    assert divided < whole
