"""The slot planner: a simulation over named slots shows that no value is overwritten while it is needed."""

from __future__ import annotations

import random

import pytest

from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.graph.planner import Slot, SlotPlan, assign_slots
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import CASES

MAY_OVERWRITE = {"add": {0: (0, 1)}, "multiply": {0: (0, 1)}}
IN_PLACE = ("add_rms_norm", "gelu", "latent", "position_scale", "rope", "rope_cache", "scale", "scale_by", "sigmoid_gate",
            "stream_weights")  # fmt: skip
MAY_OVERWRITE |= {op: {0: (0,)} for op in IN_PLACE}


def check_plan(graph: Graph, plan: SlotPlan) -> None:
    held: dict[int, Value] = {}
    for node in graph.nodes:
        for value in node.inputs:
            assert held[plan.slot_of[value]] == value, f"{value.name} was overwritten before {node.op} read it"
        outputs = [plan.slot_of[v] for v in node.outputs]
        assert len(set(outputs)) == len(outputs), "two outputs of a node share a slot"
        for index, (value, slot) in enumerate(zip(node.outputs, outputs, strict=True)):
            allowed = {plan.slot_of[node.inputs[i]] for i in MAY_OVERWRITE.get(node.op, {}).get(index, ())}
            assert slot not in {plan.slot_of[v] for v in node.inputs} - allowed, f"{node.op} writes over an input"
            shape = plan.slots[slot]
            assert shape == Slot(value.width, value.kind, value.selected, value.repeat)
            held[slot] = value


def random_graph(seed: int) -> Graph:
    """Random nodes with random live values: any order of lifetimes, dead values, values read twice."""
    rng = random.Random(seed)
    values = [Value(f"in{i}", rng.choice((8, 16)), kind=rng.choice(("f32", "q8"))) for i in range(3)]
    nodes = [Node("state_in", (), (v,)) for v in values]
    for i in range(rng.randrange(5, 60)):
        op = rng.choice(("add", "add_rms_norm", "rope", "rope_cache", "linear", "select_rows", "hidden_out"))
        x = rng.choice(values[-rng.randrange(1, 8) :])
        same = [v for v in values if (v.width, v.kind, v.selected) == (x.width, x.kind, x.selected)]
        outputs = {"add_rms_norm": 2, "linear": rng.randrange(1, 4), "hidden_out": 0}.get(op, 1)
        inputs = {"add": 2, "add_rms_norm": 2, "rope": 2, "rope_cache": 4}.get(op, 1)
        width = rng.choice((8, 16)) if op == "linear" else x.width
        made = [Value(f"v{i}.{j}", width, x.selected or op == "select_rows", x.kind) for j in range(outputs)]
        if op == "add_rms_norm" and rng.random() < 0.5:  # the norm's result has another kind
            made[1] = Value(made[1].name, width, x.selected, "q8")
        nodes.append(Node(op, (x, *(rng.choice(same) for _ in range(inputs - 1))), tuple(made)))
        values += made
    nodes.append(Node("lm_head", (values[-1],), (Value("logits", rng.choice((8, 16)), values[-1].selected),)))
    return Graph("random", nodes, 16, 8, 0, CacheSpec(1, 1, 1), 1)


@pytest.mark.parametrize("seed", range(300))
def test_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    check_plan(graph, assign_slots(graph))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_models(case: str, fused: bool) -> None:
    graph = build_graph(CASES[case]())
    graph = rules.apply(graph)[0] if fused else graph
    check_plan(graph, assign_slots(graph))


def test_slots_do_not_grow_with_layers() -> None:
    few, many = (len(assign_slots(rules.apply(build_graph(llama(num_hidden_layers=n)))[0]).slots) for n in (3, 60))
    assert few == many <= 11


def test_the_residual_stays_in_place() -> None:
    graph, _ = rules.apply(build_graph(llama()))
    plan = assign_slots(graph)
    assert len({plan.slot_of[n.outputs[0]] for n in graph.nodes if n.op == "add_rms_norm"}) == 1
    for node in graph.nodes:
        if node.op == "rope_cache":
            assert plan.slot_of[node.outputs[0]] == plan.slot_of[node.inputs[0]]


def test_the_logits_have_their_own_slot() -> None:
    graph, _ = rules.apply(build_graph(llama(vocab_size=72)))  # as wide as the hidden rows
    plan = assign_slots(graph)
    logits = graph.nodes[-1].outputs[0]
    assert [v.name for v, slot in plan.slot_of.items() if slot == plan.slot_of[logits]] == ["logits"]
