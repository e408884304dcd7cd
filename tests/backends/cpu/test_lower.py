"""Where values change their row kind: written by the producer if all consumers agree, otherwise converted once."""

from __future__ import annotations

from dataclasses import replace

from deepseek_optimizer.backends.cpu.lower import lower
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.adapters import UNFUSED, with_adapters
from deepseek_optimizer.graph.ops import OPS
from deepseek_optimizer.graph.parallel import Parallel
from deepseek_optimizer.graph.parallel.tensor import split
from deepseek_optimizer.models import build_encoder_graph, build_graph
from support.encoders import random_encoder
from support.models import CASES
from support.ranks import any_part


def lowered(formats, kinds, names=None, case="llama-gqa"):
    graph, _ = rules.apply(build_graph(CASES[case]()), names)
    return lower(graph, lambda w: kinds[formats(w)], formats)


KINDS = {"fp32": "f32", "int4": "q8", "int8": "q16"}


def test_fp32_needs_no_converts():
    graph = lowered(lambda w: "fp32", KINDS)
    assert not [n for n in graph.nodes if n.op == "convert"]
    assert all(v.kind == "f32" for n in graph.nodes for v in n.outputs)


def test_producers_write_the_kind_of_their_consumers():
    graph = lowered(lambda w: "int4", KINDS)
    for node in graph.nodes:
        if node.op in ("linear", "gate_up", "lm_head"):
            assert node.inputs[0].kind == "q8"
            maker = next(n for n in graph.nodes if node.inputs[0] in n.outputs)
            assert maker.op in ("rms_norm", "add_rms_norm", "attention", "gate_up", "swiglu", "convert")


def test_values_read_in_two_kinds_are_f32_and_converted_once_each():
    graph = lowered(lambda w: "int8" if "v_proj" in w else "int4", KINDS)
    first = [
        n for n in graph.nodes if n.op == "linear" and any(".layers.0.self_attn." in w and "o_proj" not in w for w in n.weights)
    ]
    assert sorted(n.inputs[0].kind for n in first) == ["q16", "q8"]  # qkv split in two
    converts = [
        n
        for n in graph.nodes
        if n.op == "convert" and n.inputs[0] == next(c for c in graph.nodes if c.op == "convert").inputs[0]
    ]
    assert len(converts) == 2 and {n.outputs[0].kind for n in converts} == {"q8", "q16"}


def test_gate_and_up_of_unequal_formats_are_split():
    graph = lowered(lambda w: "int8" if "up_proj" in w else "int4", KINDS)
    assert not [n for n in graph.nodes if n.op == "gate_up"]
    assert [n for n in graph.nodes if n.op == "swiglu"]


def test_gelu_joins_the_product_that_only_it_reads():
    graph = build_graph(CASES["starcoder2-window"]())
    lowered_graph = lower(graph, lambda w: "q8", lambda w: "int4")
    gelus = [n for n in graph.nodes if n.op == "gelu"]
    merged = [n for n in lowered_graph.nodes if n.op == "linear_gelu"]
    assert gelus and len(merged) == len(gelus) and not [n for n in lowered_graph.nodes if n.op == "gelu"]
    for node, gelu in zip(merged, gelus, strict=True):
        up = next(n for n in graph.nodes if gelu.inputs[0] in n.outputs)
        assert node.weights == up.weights and node.attrs == {**up.attrs, "activation": "gelu"}
        assert node.inputs[0].kind == node.outputs[0].kind == "q8"
    read_twice = [n.with_(inputs=(gelus[0].inputs[0],)) if n.op == "hidden_out" else n for n in graph.nodes]
    kept = lower(replace(graph, nodes=read_twice), lambda w: "q8", lambda w: "int4")
    assert [n.outputs[0].name for n in kept.nodes if n.op == "gelu"] == [f"{gelus[0].outputs[0].name}.q8"]


def test_gelu_joins_a_product_of_some_rows_of_a_matrix():
    graph = build_encoder_graph(random_encoder("modernbert").config)
    assert any(node.attrs.get("rows") for node in graph.nodes if node.op == "linear")
    lowered = lower(graph, lambda w: "q8", lambda w: "int8")
    merged = [node for node in lowered.nodes if node.op == "linear_gelu"]
    assert merged and all(node.attrs["rows"] for node in merged)
    assert set(merged[0].attrs) <= {attr.name for attr in OPS["linear_gelu"].attrs}


def test_adapters_read_rows_as_their_products_do():
    """And what A makes of rows of bf16 or int8 is written in bf16."""
    plain, _ = rules.apply(build_graph(CASES["llama-gqa"]()), [name for name in rules.RULES if name not in UNFUSED])
    graph = with_adapters(plain, 8)
    for kind, low_rank in {"f32": "f32", "q16": "f32", "bf16": "bf16", "q8": "bf16"}.items():
        nodes = lower(graph, lambda _: kind, lambda _: "int4").nodes  # noqa: B023 (called at once)
        downs = [node for node in nodes if node.op == "lora_down"]
        assert downs and all((n.inputs[0].kind, n.outputs[0].kind) == (kind, low_rank) for n in downs)
        read = [value for node in nodes if node.op in ("linear", "gate_up") for value in node.inputs[1:]]
        assert sorted(v.name for v in read) == sorted(n.outputs[0].name for n in downs)


def test_every_value_is_written_before_it_is_read():
    for formats in (lambda w: "int4", lambda w: "int8" if "down" in w else "fp32"):
        for names in (None, []):
            seen = set()
            for node in lowered(formats, KINDS, names).nodes:
                assert set(node.inputs) <= seen
                seen |= set(node.outputs)


def test_lowered_nodes_match_their_specs():
    """Except nodes of the model: the absorbed form of latent attention has its own operands."""
    seen = set()
    part = split(rules.apply(build_graph(CASES["qwen3-gqa"]()))[0], 0, Parallel(2), any_part).graph
    divided = lower(part, lambda name: "f32", lambda name: "fp32")
    for graph in (*(lowered(lambda w: "int4", KINDS, names, case) for case in CASES for names in (None, [])), divided):
        for node in graph.nodes:
            spec = OPS[node.op]
            if spec.origin == "lowering":
                seen.add(node.op)
                assert len(node.inputs) == len(spec.inputs) and len(node.outputs) == len(spec.outputs)
                required = sum(not weight.optional for weight in spec.weights)
                assert required <= len(node.weights) <= len(spec.weights) and spec.fits(node, graph)
                assert all(attr.type.accepts(attr.of(node)) for attr in spec.attrs)
    assert seen == {name for name, spec in OPS.items() if spec.origin == "lowering" and spec.code is not None}
