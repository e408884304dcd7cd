"""Plans of DeepSeek-V4 equal the reference backend's: all types of layers, phases, caches, captured steps, MTP layers."""

from __future__ import annotations

import pytest

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.rows_store import CudaRowsStore
from deepseek_optimizer.backends.cuda.supported import ROW_DTYPES
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_mtp_graph
from deepseek_optimizer.quant.packed import PackedMatrix, PackedStack
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model, random_weights, weights_of
from support.steps import Part, run_step, runner

from ..cpu.packing import dequantized, packed_weights
from .plans import BF16_CACHE, FORMAT_TOLERANCE, check_mixed_steps, graph_of, pair, stepwise

SLIDING, SPARSE, HEAVY = (f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed"))
# As small as they can be, see test_plan.py.
TINY = {
    "vocab_size": 31, "hidden_size": 20, "moe_intermediate_size": 12, "num_attention_heads": 2, "head_dim": 12,
    "qk_rope_head_dim": 4, "q_lora_rank": 12, "o_groups": 2, "o_lora_rank": 10, "sliding_window": 9, "hc_mult": 2,
    "hc_sinkhorn_iters": 3, "n_routed_experts": 3, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 8,
    "compress_rates": {SPARSE: 3, HEAVY: 7},
}  # fmt: skip
FAMILIES = {
    "sparse-by-table": {"layer_types": [SPARSE], "mlp_layer_types": ["hash_moe"]},
    "heavy-and-sliding": {"layer_types": [HEAVY, SLIDING], "mlp_layer_types": ["moe", "moe"], "hc_mult": 3},
    "sigmoid-yarn": {
        "layer_types": [SPARSE], "mlp_layer_types": ["moe"], "scoring_func": "sigmoid",
        "rope_parameters": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32},
    },
}  # fmt: skip


def model_of(family: str):
    fields = FAMILIES[family]
    return random_model(configs.deepseek_v4(**TINY | {"num_hidden_layers": len(fields["layer_types"])} | fields))


@pytest.fixture(scope="module")
def backend():
    return CudaBackend(DEVICE)


@pytest.fixture(scope="module")
def sparse():
    return model_of("sparse-by-table")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(backend, family):
    model = model_of(family)
    made, exact = pair(backend, model)
    ids = random_ids(model.config, 36)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


def test_mixed_steps(backend, sparse):
    check_mixed_steps(backend, sparse)


def test_a_bf16_cache(backend):
    """Of heavily compressed layers: which entries a sparse one chooses may change with rounding."""
    model = model_of("heavy-and-sliding")
    made, exact = pair(backend, model, "fp32", "bf16")
    ids = random_ids(model.config, 21)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), BF16_CACHE)


def test_layers_that_draft(backend, sparse):
    """The model returns all streams, which are the input of its MTP layer; that returns streams of its own."""
    ids = random_ids(sparse.config, 6)
    of_model = [
        run_step(each.plan, each.store, [Part(each.sequence(), ids)], draft_states=True, last_hidden=True)
        for each in pair(backend, sparse)
    ]
    graph = rules.apply(build_mtp_graph(sparse.config, 0, 1))[0]
    weights, of_layer = packed_weights(random_weights(graph, 1), "fp32"), []
    for owner, given in ((backend, weights), (ReferenceBackend(), dequantized(weights))):
        run = runner(owner, graph, given, blocks=4)
        states = of_model[1].draft_states
        of_layer.append(run_step(run.plan, run.store, [Part(run.sequence(), ids)], states=states, draft_states=True))
    assert of_model[0].draft_states.shape == (6, 2 * 20)
    for ours, theirs in (of_model, of_layer):
        assert_close_rows(ours.logits, theirs.logits, FORMAT_TOLERANCE["fp32"])
        assert_close_rows(ours.draft_states, theirs.draft_states, FORMAT_TOLERANCE["fp32"])
    assert_close_rows(of_model[0].last_hidden, of_model[1].last_hidden, FORMAT_TOLERANCE["fp32"])


def test_sizes_equal_the_buffers(backend, sparse):
    graph, weights = graph_of(sparse), packed_weights(weights_of(sparse), "int8")
    formats = {name: w.format for name, w in weights.items() if isinstance(w, (PackedMatrix, PackedStack))}
    for kv in ROW_DTYPES:
        store = backend.new_store(graph, kv, 3)
        assert isinstance(store, CudaRowsStore)
        store.ensure(1)
        assert backend.block_bytes(graph, kv) == store.block_bytes == store.data[0].nbytes == store.saved_bytes
    with pytest.raises(BackendError, match="KV cache dtype 'int8' of family 'deepseek_v4'; choose kv_cache among fp32, bf16"):
        backend.new_store(graph, "int8", 3)
    plan = backend.compile(graph, weights)
    plan.reserve(64, 4)
    assert sum(b.nbytes for b in plan._buffers) < plan.buffer_bytes(64, 4)
    assert plan.buffer_bytes(64, 4) == backend.buffer_bytes(graph, formats, CompileOptions(), 64, 4) - 4 * 31 * 4
