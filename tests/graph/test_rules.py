"""Fusion rules: where each applies, and that no selection of rules changes a result."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import GraphError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import hidden_only
from deepseek_optimizer.graph.ir import LatentSpec, RowsSpec
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_graph
from support.family_configs import llama
from support.models import (
    CASES,
    assert_close_rows,
    random_ids,
    random_model,
    transformers_hidden,
    transformers_logits,
    weights_of,
)
from support.steps import Part, run_step, runner

ALL = tuple(rules.RULES)
LATENT = ["deepseek_v2-groups", "deepseek_v3-groups", "deepseek_v32-types", "youtu-halves"]
LATENT += ["mistral4-groups", "glm_moe_dsa-shared"]
LLAMA_LIKE = ("llama-", "qwen2-", "qwen3-", "mistral", "deepseek", "youtu")  # cases
CHOICES = {
    "none": (), "all": ALL, **{f"only {r}": (r,) for r in ALL}, **{f"without {r}": tuple(o for o in ALL if o != r) for r in ALL}
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("case", ["llama-biases", "qwen2-windows", "qwen3-tied", "ministral3-growing", *LATENT])
def test_results_do_not_depend_on_rules(case: str, choice: str) -> None:
    model = random_model(CASES[case]())
    ids = random_ids(model.config, 70)
    graph, _ = rules.apply(build_graph(model.config), CHOICES[choice])
    check_graph(graph)
    run = runner(ReferenceBackend(), graph, weights_of(model))
    assert_close_rows(run.logits(ids, chunks=[3, 40]), transformers_logits(model, ids))
    assert_close_rows(run.hidden(ids), transformers_hidden(model, ids))


@pytest.mark.parametrize("case", ["lfm2-mixed", "qwen3_5_text-mixed", "qwen3_next-experts"])
def test_projections_of_recurrent_layers_are_merged(case: str) -> None:
    graph = build_graph(CASES[case]())
    fused, reports = rules.apply(graph)
    counts = {r.rule: r.count for r in reports}
    convolutions = sum(n.op == "short_conv" for n in graph.nodes)
    assert counts["qkv"] == counts["rope_cache"] + convolutions and counts["rope_cache"] == graph.cache.layers
    merged = [n for n in fused.nodes if n.op == "linear" and len(n.weights) > 1]
    assert max(len(n.weights) for n in merged) == 3 and set(fused.weights()) == set(graph.weights())


@pytest.mark.parametrize("case", [case for case in CASES if not build_graph(CASES[case]()).states])
def test_each_rule_applies_everywhere(case: str) -> None:
    config = CASES[case]()
    graph = build_graph(config)
    layers = 0 if isinstance(graph.cache, RowsSpec) else config.num_hidden_layers
    plain = 0 if isinstance(graph.cache, LatentSpec) else layers  # with keys and values per head
    own = graph.cache.layers if plain else 0  # of them, those that write to the cache
    compressed = sum(n.op == "compressed_attention" for n in graph.nodes)
    experts = sum(n.op in ("router", "hash_router") for n in graph.nodes)
    producers = {value: node.op for node in graph.nodes for value in node.outputs}
    rotated = sum(n.op == "cache_write" and producers[n.inputs[0]] == "rope" for n in graph.nodes)
    summed = len({n.inputs[0] for n in graph.nodes if n.op == "rms_norm" and producers[n.inputs[0]] == "add"})
    gates = [n for n in graph.nodes if n.op in ("swiglu", "geglu")]
    gated = sum(all(producers[v] == "linear" for v in n.inputs) for n in gates)
    final = graph.nodes[-3]  # before its hidden_out and the head
    final_sum = final.op == "rms_norm" and producers[final.inputs[0]] == "add"
    expected = {
        "qkv": own + layers - plain + compressed, "rope_cache": rotated, "attention_softmax": plain,
        "mla_absorb": layers - plain, "experts": experts,
        "gate_up": gated, "last_logits": 1,
        "layer_norm": summed - final_sum,  # not the last one, whose rows are selected
    }  # fmt: skip
    if case.startswith(LLAMA_LIKE):
        assert (rotated, gated, summed) == (plain, layers, 2 * layers)  # all norms except the model's first
    fused, reports = rules.apply(graph)
    assert {r.rule: r.count for r in reports} == expected
    assert all(r.count == len(r.places) for r in reports)
    ops = Counter(node.op for node in fused.nodes)
    before = Counter(node.op for node in graph.nodes)
    assert ops["gate_up"] == gated and ops["rope_cache"] == rotated and ops["cache_write"] == own - rotated
    assert ops["attention"] == plain and ops["swiglu"] + ops["geglu"] == len(gates) - gated
    assert ops["add"] == before["add"] - expected["layer_norm"]
    assert ops["rope"] == before["rope"] - 2 * rotated
    if case.startswith(LLAMA_LIKE) and layers:
        assert ops["add"] == 1 + experts and (ops["linear"] == 3 * layers or not plain) and not (ops["rope"] and plain)
    assert all(n.attrs["form"] == "absorbed" for n in fused.nodes if n.op == "mla_attention")
    assert all(n.attrs["grouped"] for n in fused.nodes if n.op.startswith("experts_"))
    assert fused.weights() and set(fused.weights()) == set(graph.weights())
    alone = {name: rules.apply(graph, [name])[1][0].count for name in ALL}
    assert alone == {**expected, "layer_norm": summed}  # if it is the only rule, the final norm is fused too


def test_fusing_is_idempotent_and_does_not_modify_its_input() -> None:
    graph = build_graph(llama())
    before = copy.copy(graph.nodes)
    fused, _ = rules.apply(graph)
    assert graph.nodes == before
    again, reports = rules.apply(fused)
    assert again.nodes == fused.nodes and not any(r.count for r in reports)


def test_order_of_names_does_not_matter() -> None:
    graph = build_graph(llama())
    assert rules.apply(graph, ALL[::-1])[0].nodes == rules.apply(graph, ALL)[0].nodes


@pytest.mark.parametrize(("name", "nearest"), [("qvk", "qkv"), ("layernorm", "layer_norm"), ("gate-up", "gate_up"), ("", "")])
def test_unknown_rules_suggest_the_closest(name: str, nearest: str) -> None:
    with pytest.raises(GraphError, match=f"did you mean '{nearest}"):
        rules.apply(build_graph(llama()), ["qkv", name])


def test_the_norm_for_hidden_states_runs_only_on_request() -> None:
    """With `last_logits`, the norm of all rows is used only by `hidden_out`."""
    graph, _ = rules.apply(build_graph(llama()))
    only = [graph.nodes[i] for i in sorted(hidden_only(graph))]
    assert Counter(n.op for n in only) == {"hidden_out": graph.hidden_states, "rms_norm": 1}
    plain = build_graph(llama())
    assert all(plain.nodes[i].op == "hidden_out" for i in hidden_only(plain))


def test_selected_rows_are_the_requested_ones() -> None:
    model = random_model(llama())
    ids = random_ids(model.config, 40)
    expected = transformers_logits(model, ids)
    for names in ((), ALL):
        run = runner(ReferenceBackend(), rules.apply(build_graph(model.config), names)[0], weights_of(model))
        for rows in ([39], [0, 7, 31, 32], []):
            output = run_step(run.plan, run.store, [Part(run.sequence(), ids, rows=rows)])
            assert output.logits.shape == (len(rows), model.config.vocab_size) and output.logits.dtype == torch.float32
            assert_close_rows(output.logits, expected[rows])
