"""check_graph accepts the graphs of families and rules (see their tests), and rejects each kind of damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from deepseek_optimizer.errors import GraphError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.ir import Graph, Node, Value
from deepseek_optimizer.graph.printing import node_text, to_text
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph, build_mtp_graph
from support.family_configs import deepseek_v3, deepseek_v4, deepseek_v32, llama, qwen3


def first(graph: Graph, op: str) -> int:
    return next(i for i, n in enumerate(graph.nodes) if n.op == op)


def attr(op: str, **changes: object) -> Callable[[Graph], list[Node]]:
    def damage(graph: Graph) -> list[Node]:
        at = first(graph, op)
        node = graph.nodes[at]
        return [*graph.nodes[:at], node.with_(attrs={**node.attrs, **changes}), *graph.nodes[at + 1 :]]

    return damage


def without(op: str) -> Callable[[Graph], list[Node]]:
    return lambda graph: [n for i, n in enumerate(graph.nodes) if i != first(graph, op)]


def twice(op: str) -> Callable[[Graph], list[Node]]:
    return lambda graph: [*graph.nodes, graph.nodes[first(graph, op)]]


def outputs(op: str, *made: Value) -> Callable[[Graph], list[Node]]:
    def damage(graph: Graph) -> list[Node]:
        at = first(graph, op)
        return [*graph.nodes[:at], graph.nodes[at].with_(outputs=made), *graph.nodes[at + 1 :]]

    return damage


DAMAGES = {
    "unknown op": (lambda g: [*g.nodes, Node("softmax")], "no such op"),
    "value never made": (without("embedding"), "no earlier node computes"),
    "order": (lambda g: g.nodes[::-1], "no earlier node computes"),
    "made twice": (twice("embedding"), "a second time"),
    "cache never written": (without("cache_write"), "before it is written"),
    "cache written twice": (twice("cache_write"), "a second time"),
    "two heads": (lambda g: [*g.nodes, g.nodes[-1].with_(outputs=(Value("more", g.vocab_size),))], "lm_head"),
    "hidden state missing": (without("hidden_out"), "hidden_out"),
    "hidden state twice": (twice("hidden_out"), "hidden_out"),
    "layer outside": (attr("cache_write", layer=99), "do not fit"),
    "heads not grouped": (attr("attention", kv_heads=4), "do not fit"),
    "rope too wide": (attr("rope", heads=3), "do not fit"),
    "head norm": (attr("head_norm", heads=3), "do not fit"),
    "biases": (attr("linear", biases=()), "do not fit"),
    "embedding width": (outputs("embedding", Value("embed", 8)), "do not fit"),
    "too many outputs": (outputs("rms_norm", Value("a", 72), Value("b", 72)), "has 2 outputs, needs 1"),
    "no outputs": (outputs("linear"), "has 0 outputs, needs 1 or more"),
    "type of an attribute": (attr("rms_norm", eps="1e-6"), "eps is '1e-6', needs float"),
    "truth for a number": (attr("rope", heads=True), "heads is True, needs int"),
    "unknown attribute": (attr("attention", windw=3), "has no attribute windw; known: layer, heads,"),
    "op of a backend": (lambda g: [*g.nodes, Node("convert")], "no such op"),
    "rows": (outputs("rms_norm", Value("a", 72, selected=True)), "mixes"),
}


LATENT_DAMAGES = {
    "latents never written": (without("latent_write"), "latents of a layer before"),
    "latents written twice": (twice("latent_write"), "latents of a layer a second time"),
    "index keys never written": (without("index_write"), "index keys of a layer before"),
    "index keys written twice": (twice("index_write"), "index keys of a layer a second time"),
    "layer outside": (attr("latent_write", layer=3), "do not fit"),
    "attention's layer outside": (attr("mla_attention", layer=3), "do not fit"),
    "rank": (attr("mla_attention", rank=39), "do not fit"),
    "rank of the latent": (attr("latent", rank=39), "do not fit"),
    "heads": (attr("mla_attention", heads=2), "do not fit"),
    "width of a value": (attr("mla_attention", v_dim=17), "do not fit"),
    "form": (attr("mla_attention", form="folded"), 'form is \'folded\', needs "expanded" or "absorbed"'),
    "offset": (attr("rope", offset=21), "do not fit"),
    "index heads": (attr("index_choose", heads=7), "do not fit"),
    "index width": (attr("index_choose", index=12, heads=40), "do not fit"),
    "tokens chosen": (attr("index_choose", top_k=15), "do not fit"),
    "groups": (attr("router", groups=5), "do not fit"),
    "groups chosen": (attr("router", top_groups=4), "do not fit"),
    "experts in the groups": (attr("router", groups=12, top_groups=2), "do not fit"),
    "experts chosen": (attr("router", top_k=3), "do not fit"),
    "scoring": (attr("router", scoring="linear"), "scoring is 'linear'"),
    "score of a group": (attr("router", group_score="mean"), "group_score is 'mean'"),
    "experts a token": (attr("experts_gate_up", top_k=3), "do not fit"),
    "more chosen than there are": (attr("experts_down", experts=3), "do not fit"),
    "rows a token": (outputs("experts_gate_up", Value("l1.mlp.experts", 44)), "do not fit"),
    "rows a token elsewhere": (outputs("swiglu", Value("h", 136, repeat=2)), "several rows per token"),
    "norm of another width": (outputs("layer_norm", Value("k", 20)), "do not fit"),
    "selected rows": (outputs("router", Value("routes", 8, selected=True)), "mixes"),
    "inputs": (lambda g: [*g.nodes, Node("mla_attention")], "has 0 inputs, needs 1 or 2"),
}


def check_damage(graph: Graph, damage: Callable[[Graph], list[Node]], message: str) -> None:
    """Checks that the graph is valid, and invalid after the damage."""
    check_graph(graph)
    with pytest.raises(GraphError, match=message):
        check_graph(replace(graph, nodes=damage(graph)))


@pytest.mark.parametrize("name", LATENT_DAMAGES)
def test_damage_to_latent_attention_and_experts_is_detected(name: str) -> None:
    check_damage(build_graph(deepseek_v32()), *LATENT_DAMAGES[name])


def test_damage_to_an_mtp_layer_is_detected() -> None:
    for damage in (outputs("concat", Value("l3.both", 143)), outputs("state_in", Value("state", 71))):
        check_damage(build_mtp_graph(deepseek_v3(), 0), damage, "do not fit")


def test_damage_to_draft_states_is_detected() -> None:
    """Those of V4's MTP layers are as wide as what the layers take."""
    graph = build_mtp_graph(deepseek_v4(), 0)
    assert graph.draft_width == 3 * 72 and build_mtp_graph(deepseek_v3(), 0).draft_width == 72
    for damage, message in (
        (outputs("state_in", Value("state", 72)), "do not fit"),
        (twice("draft_out"), "at most one draft_out"),
        (without("draft_out"), "do not fit"),
    ):
        check_damage(graph, damage, message)


def test_ops_need_their_kind_of_cache() -> None:
    for ours, theirs in ((llama(), deepseek_v3()), (deepseek_v3(), llama())):
        with pytest.raises(GraphError, match="do not fit"):
            check_graph(replace(build_graph(ours), cache=build_graph(theirs).cache))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_detected(name: str) -> None:
    check_damage(build_graph(qwen3()), *DAMAGES[name])


@pytest.mark.parametrize(
    "name", ["rms_norm", "linear", "attention", "rope", "lm_head", "embedding", "cache_write", "hidden_out"]
)
def test_a_missing_attribute_is_named(name: str) -> None:
    graph = build_graph(llama())
    at = first(graph, name)
    graph.nodes[at] = graph.nodes[at].with_(attrs={})
    with pytest.raises(GraphError, match="lacks"):
        check_graph(graph)


def test_text_form() -> None:
    graph = build_graph(llama())
    lines = to_text(graph).splitlines()
    assert len(lines) == len(graph.nodes) + 1
    assert node_text(graph.nodes[4]) == "l0.q[T,72] = linear(l0.attn_in) model.layers.0.self_attn.q_proj.weight biases=(None,)"
    assert "logits[R,211] = lm_head(final.rows) lm_head.weight" in to_text(rules.apply(graph)[0])
    assert "rope=default/12" in to_text(graph)
    assert "l1.mlp.experts[T*4,44] = experts_gate_up(l1.mlp_in, l1.mlp.routes)" in to_text(build_graph(deepseek_v3()))
