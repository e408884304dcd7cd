"""Plans of models with experts and latent attention equal the reference backend's: families, formats, phases, windows."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.base import DECODE, CompileOptions
from deepseek_optimizer.backends.cuda import latent_ops, plan
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.kernels import expanded_attention
from deepseek_optimizer.backends.cuda.latent_store import CudaLatentStore
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
from deepseek_optimizer.backends.cuda.store import KV_DTYPES
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.models import build_mtp_graph
from deepseek_optimizer.quant import pack
from deepseek_optimizer.quant.packed import PackedMatrix, PackedStack
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model, random_weights, weights_of
from support.steps import Part, run_step, runner

from ..cpu.packing import dequantized, packed_weights
from .plans import BF16_CACHE, FORMAT_TOLERANCE, check_mixed_steps, graph_of, pair, stepwise

# As small as they can be, see test_plan.py; the first layer is dense, the second has experts.
TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10,
}  # fmt: skip
ONE = TINY | {"num_hidden_layers": 1}
EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 20}
LATENT = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 28,
}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 2}
PLAIN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
FAMILIES = {
    "deepseek_v2-greedy": lambda: configs.deepseek_v2(**LATENT | EXPERTS | {"q_lora_rank": None}),
    "deepseek_v2-groups": lambda: configs.deepseek_v2(
        **LATENT | EXPERTS | GROUPS | {"topk_method": "group_limited_greedy", "n_shared_experts": 2}
    ),
    "deepseek_v3-groups": lambda: configs.deepseek_v3(**LATENT | EXPERTS | GROUPS),
    "deepseek_v3-halves": lambda: configs.deepseek_v3(**LATENT | EXPERTS | GROUPS, rope_interleave=False, attention_bias=True),
    "deepseek_v32-indexer": lambda: configs.deepseek_v32(
        **LATENT
        | EXPERTS
        | GROUPS
        | {"index_topk": 8, "index_head_dim": 16, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    ),
    "mixtral": lambda: configs.mixtral(**ONE | {"intermediate_size": 20, "num_local_experts": 5}, sliding_window=9),
    "qwen2_moe-shared": lambda: configs.qwen2_moe(**ONE | PLAIN),
    "qwen3_moe-normalized": lambda: configs.qwen3_moe(**ONE | PLAIN, norm_topk_prob=True),
}


@pytest.fixture(scope="module")
def backend():
    return CudaBackend(DEVICE)


@pytest.fixture(scope="module")
def deepseek():
    return random_model(FAMILIES["deepseek_v3-groups"]())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(backend, family):
    model = random_model(FAMILIES[family]())
    made, exact = pair(backend, model)
    ids = random_ids(model.config, 39)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


def decisive(model):
    """The model with experts whose choice no rounding changes: a large correction bias decides it."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(len(buffer)).flip(0) * 2.0 % 7)
    return model


@pytest.mark.parametrize(("format_name", "kv"), [("bf16", "bf16"), ("int8", "fp32"), ("int4", "bf16"), ("bf16", "fp8")])
def test_formats_and_caches(backend, format_name, kv):
    model = decisive(random_model(FAMILIES["deepseek_v3-groups"]()))
    made, exact = pair(backend, model, format_name, kv)
    ids = random_ids(model.config, 21)
    tolerance = FORMAT_TOLERANCE[format_name] if kv == "fp32" else max(FORMAT_TOLERANCE[format_name], BF16_CACHE)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), tolerance)


def test_mixed_steps(backend, deepseek):
    check_mixed_steps(backend, deepseek)


def test_prompts_are_expanded_beside_decoding(backend, deepseek, monkeypatch):
    """As if steps of two rows were large: a prompt, and one of two sequences beside one that decodes."""
    monkeypatch.setattr(latent_ops, "MOST_ROWS", 1)
    monkeypatch.setattr(plan, "may_be_captured", lambda batch: False)
    called, expanded = [], expanded_attention.expanded_attention
    monkeypatch.setattr(expanded_attention, "expanded_attention", lambda *a, **b: (called.append(len(a[0])), expanded(*a, **b)))
    results = []
    for made in pair(backend, deepseek):
        first, second, ids = made.sequence(), made.sequence(), random_ids(deepseek.config, 20)
        one = run_step(made.plan, made.store, [Part(first, ids[:9])]).logits
        parts = [Part(first, ids[9:10], DECODE), Part(second, ids[10:])]
        results.append(torch.cat((one, run_step(made.plan, made.store, parts).logits)))
    assert called == [9, 9, 10, 10]  # of two layers
    assert_close_rows(*results, FORMAT_TOLERANCE["fp32"])


def test_graphs_without_fusion(backend, deepseek):
    graph = graph_of(deepseek, fused=False)
    assert {node.attrs["form"] for node in graph.nodes if node.op == "mla_attention"} == {"expanded"}
    made, exact = pair(backend, deepseek, graph=graph)
    ids = random_ids(deepseek.config, 6)
    assert_close_rows(made.logits(ids), exact.logits(ids), FORMAT_TOLERANCE["fp32"])


def test_sliding_mode_with_sinks(backend):
    model = random_model(configs.deepseek_v2(**LATENT | {"num_hidden_layers": 1, "first_k_dense_replace": 1}))
    graph = apply_mode(graph_of(model), AttentionMode("sliding", window=8, sinks=4))[0]
    made, exact = pair(backend, model, graph=graph)
    ids = random_ids(model.config, 45)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


def test_layers_that_draft(backend, deepseek):
    """The MTP layer of DeepSeek-V3: its input is a hidden state beside an embedding, its cache follows the model's layers."""
    graph = rules.apply(build_mtp_graph(deepseek.config, 0, 1))[0]
    assert {"state_in", "concat"} <= {node.op for node in graph.nodes}
    weights = packed_weights(random_weights(graph, 1), "fp32")
    states, ids, results = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)), [3, 1, 4, 1, 5, 9], []
    for owner, given in ((backend, weights), (ReferenceBackend(), dequantized(weights))):
        run = runner(owner, graph, given, blocks=2)
        parts = [Part(run.sequence(), ids, rows=[4, 5])]
        results.append(run_step(run.plan, run.store, parts, states=states, draft_states=True))
    for name in ("logits", "draft_states"):
        assert_close_rows(getattr(results[0], name), getattr(results[1], name), FORMAT_TOLERANCE["fp32"])


def test_sizes_equal_the_buffers(backend, deepseek):
    graph, weights = graph_of(deepseek), packed_weights(weights_of(deepseek), "int8")
    formats = {name: w.format for name, w in weights.items() if isinstance(w, (PackedMatrix, PackedStack))}
    for kv in KV_DTYPES:
        store = backend.new_store(graph, kv, 3)
        store.ensure(1)
        assert backend.block_bytes(graph, kv) == store.block_bytes == store.data[0].nbytes == store.saved_bytes
    with pytest.raises(BackendError, match="KV cache dtype 'int4' of family 'deepseek_v3'; choose kv_cache among fp32, bf16"):
        backend.new_store(graph, "int4", 3)
    made = backend.compile(graph, weights)
    made.reserve(64, 4)
    assert sum(b.nbytes for b in made._buffers) < made.buffer_bytes(64, 4)
    assert made.buffer_bytes(64, 4) == backend.buffer_bytes(graph, formats, CompileOptions(), 64, 4) - 4 * 31 * 4


def test_description(backend, deepseek):
    made = pair(backend, deepseek, "int8")[0].plan
    rows = {row["op"]: row for row in made.describe()}
    stack = made._weights.stacks["model.layers.1.mlp.experts.gate_up_proj"]
    assert rows["experts_gate_up"]["format"] == "int8" and rows["experts_gate_up"]["bytes"] == stack.words.nbytes
    absorbed = rows["mla_attention"]
    assert absorbed["format"] == "int8" and absorbed["bytes"] > 0


def test_routers_may_be_packed(backend, deepseek):
    graph, weights = graph_of(deepseek), packed_weights(weights_of(deepseek), "fp32")
    name, ids = "model.layers.1.mlp.gate.weight", random_ids(deepseek.config, 3)
    results = []
    for router in (weights[name], pack(weights[name], "fp32")):
        own, store = backend.compile(graph, {**weights, name: router}), backend.new_store(graph, "fp32", 2)
        made = pair(backend, deepseek)[0]
        results.append(run_step(own, store, [Part(made.sequence(), ids)]).logits)
    assert torch.equal(*results)


def test_weights_that_do_not_fit_are_named(backend, deepseek, monkeypatch):
    monkeypatch.delitem(LAYOUTS, "q5_1")  # as if this format had no kernels
    graph, weights = graph_of(deepseek), packed_weights(weights_of(deepseek), "fp32")
    name = "model.layers.1.mlp.experts.down_proj"
    stack = weights[name]
    for wrong, said in (
        (stack.matrix(0), "must be a packed stack for the cuda backend, got a PackedMatrix"),
        (PackedStack("q5_1", *stack.shape, stack.data), "weight format 'q5_1' of .*choose precision among"),
        (PackedStack("q4_1", *stack.shape, stack.data), "has tiles of 2048 bytes, but those of q4_1 have 320"),
        (PackedStack("fp32", 4, 40, 20, stack.data[:4]), r"has shape \(4, 40, 20\), but the graph needs \(6, 40, 20\)"),
    ):
        with pytest.raises(BackendError, match=said):
            backend.compile(graph, {**weights, name: wrong})


def test_stores_of_the_other_kind_are_refused(backend, deepseek):
    made, _ = pair(backend, deepseek)
    dense = backend.new_store(graph_of(random_model(FAMILIES["mixtral"]())), "fp32", 2)
    assert isinstance(made.store, CudaLatentStore)
    with pytest.raises(BackendError, match="store: the plan needs a CudaLatentStore of its backend, got a CudaStore"):
        run_step(made.plan, dense, [Part(made.sequence(), [1])])
