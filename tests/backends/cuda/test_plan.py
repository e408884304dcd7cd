"""Plans equal the reference backend's: families, formats, caches, phases, windows, and what a step may ask for."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

DEVICE = triton_interpreter.require_device()

from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cuda import supported
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.sampling import GREEDY, TokenChoice, choose_tokens
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.attention_mode import AttentionMode, apply_mode
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import ColumnOrder, PackedMatrix, pack, unpack
from support import family_configs as configs
from support.models import CASES, assert_close_rows, random_ids, random_model, weights_of
from support.steps import Part, run_step, runner

from ..cpu.packing import dequantized, packed_weights
from .plans import BF16_CACHE, FORMAT_TOLERANCE, check_mixed_steps, graph_of, pair, stepwise

# The interpreter takes 0.1 ms for an operation of a program, so models are as small as they can be.
TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10,
}  # fmt: skip
TWO = TINY | {"num_hidden_layers": 2}
FAMILIES = {
    "llama-biases": lambda: configs.llama(**TINY | {"num_attention_heads": 4, "num_key_value_heads": 2}, mlp_bias=True),
    "llama-dynamic": lambda: configs.llama(
        **TINY | {"max_position_embeddings": 16} | configs.rope("dynamic", factor=4.0), attention_bias=True
    ),
    "mistral-tied-window": lambda: configs.mistral(**TINY, tie_word_embeddings=True, sliding_window=9),
    "qwen2-gqa": lambda: configs.qwen2(**TINY),
    "qwen3-types": lambda: configs.qwen3(
        **TWO, use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "smollm3-nope": lambda: configs.smollm3(**TWO, use_sliding_window=True, sliding_window=11, no_rope_layers=[1, 0]),
}


@pytest.fixture(scope="module")
def backend():
    return CudaBackend(DEVICE)


@pytest.fixture(scope="module")
def llama():
    return random_model(FAMILIES["llama-biases"]())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(backend, family):
    model = random_model(FAMILIES[family]())
    made, exact = pair(backend, model)
    ids = random_ids(model.config, 39)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


@pytest.mark.parametrize(
    ("format_name", "kv"),
    [("fp32", "bf16"), ("bf16", "bf16"), ("int8", "fp32"), ("int4", "bf16"), ("fp32", "int8"), ("fp32", "fp8")],
)
def test_formats_and_caches(backend, format_name, kv):
    model = random_model(FAMILIES["qwen2-gqa"]())
    made, exact = pair(backend, model, format_name, kv)
    ids = random_ids(model.config, 34)
    tolerance = FORMAT_TOLERANCE[format_name] if kv == "fp32" else max(FORMAT_TOLERANCE[format_name], BF16_CACHE)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), tolerance)


def test_mixed_steps(backend, llama):
    check_mixed_steps(backend, llama)


def test_graphs_without_fusion(backend):
    """With their own ops for RoPE, cache writes, residuals and SwiGLU, and logits of all rows."""
    model = random_model(FAMILIES["qwen3-types"]())
    graph = graph_of(model, fused=False)
    assert {"rope", "cache_write", "add", "swiglu"} <= {node.op for node in graph.nodes}
    made, exact = pair(backend, model, graph=graph)
    ids = random_ids(model.config, 11)
    assert_close_rows(made.logits(ids), exact.logits(ids), FORMAT_TOLERANCE["fp32"])


def test_sliding_mode_with_sinks(backend):
    model = random_model(FAMILIES["qwen2-gqa"]())
    graph = apply_mode(rules.apply(build_graph(model.config))[0], AttentionMode("sliding", window=8, sinks=4))[0]
    made, exact = pair(backend, model, graph=graph)
    ids = random_ids(model.config, 45)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), FORMAT_TOLERANCE["fp32"])


def test_hidden_states_and_embeddings(backend, llama):
    made, exact = pair(backend, llama)
    embeds = torch.randn(6, 40, generator=torch.Generator().manual_seed(5))
    outputs = []
    for run in (made, exact):
        parts = [Part(run.sequence(), [1] * 6, rows=[5])]
        outputs.append(
            run_step(run.plan, run.store, parts, hidden=True, last_hidden=True, draft_states=True, inputs_embeds=embeds)
        )
    ours, theirs = outputs
    assert torch.equal(ours.hidden[0], embeds) and torch.equal(ours.last_hidden, ours.hidden[-1])
    for name in ("logits", "last_hidden", "draft_states"):
        assert_close_rows(getattr(ours, name), getattr(theirs, name), FORMAT_TOLERANCE["fp32"])
    assert_close_rows(ours.hidden.flatten(0, 1), theirs.hidden.flatten(0, 1), FORMAT_TOLERANCE["fp32"])


def test_logits_are_written_to_the_caller(backend, llama):
    made, _ = pair(backend, llama)
    logits = torch.full((2, 31), torch.nan)
    output = run_step(made.plan, made.store, [Part(made.sequence(), [3, 4, 5], rows=[0, 2])], logits=logits)
    assert output.logits is logits and logits.isfinite().all()
    for wrong in (torch.zeros(1, 31), torch.zeros(2, 30), torch.zeros(2, 62)[:, ::2], torch.zeros(2, 31, dtype=torch.float64)):
        with pytest.raises(BackendError, match=r"step.logits: must be contiguous float32 \[2, 31\], got"):
            run_step(made.plan, made.store, [Part(made.sequence(), [3, 4, 5], rows=[0, 2])], logits=wrong)
    with pytest.raises(BackendError, match="step.logits: must be on cpu, as the plan is, got a tensor on meta"):
        elsewhere = torch.empty(2, 31, device="meta")
        run_step(made.plan, made.store, [Part(made.sequence(), [3, 4, 5], rows=[0, 2])], logits=elsewhere)
    assert run_step(made.plan, made.store, [Part(made.sequence(), [3], rows=[])]).logits.shape == (0, 31)


def test_plans_without_a_head(backend, llama):
    graph = graph_of(llama).without_head()
    weights = packed_weights(weights_of(llama), "fp32")
    results = []
    for owner in (backend, ReferenceBackend()):
        run = runner(owner, graph, weights, blocks=4)
        results.append(run_step(run.plan, run.store, [Part(run.sequence(), [5, 6, 7], rows=[])], last_hidden=True))
    assert results[0].logits.shape[0] == 0
    assert_close_rows(results[0].last_hidden, results[1].last_hidden, FORMAT_TOLERANCE["fp32"])


def test_sizes_equal_the_buffers(backend, llama):
    graph, weights = graph_of(llama), packed_weights(weights_of(llama), "int4")
    formats = {name: w.format for name, w in weights.items() if isinstance(w, PackedMatrix)}
    for kv in backend.capabilities.kv_dtypes:
        store = backend.new_store(graph, kv, 3)
        store.ensure(1)
        assert backend.block_bytes(graph, kv) == store.block_bytes == store.data[0].nbytes == store.saved_bytes
    plan = backend.compile(graph, weights)
    plan.reserve(64, 4)
    values = sum(buffer.nbytes for buffer in plan._buffers)
    predicted = backend.buffer_bytes(graph, formats, CompileOptions(), 64, 4)
    assert values < plan.buffer_bytes(64, 4) == predicted - 4 * 31 * 4


def test_gate_and_up_of_different_formats(backend, llama):
    """They are two products, the second of which takes memory of its own."""
    graph, exact = graph_of(llama), packed_weights(weights_of(llama), "fp32")
    rounded = packed_weights(weights_of(llama), "int8")
    weights = {name: rounded[name] if name.endswith("up_proj.weight") else weight for name, weight in exact.items()}
    made = runner(backend, graph, weights, blocks=4)
    reference = runner(ReferenceBackend(), graph, dequantized(weights), blocks=4)
    ids = random_ids(llama.config, 9)
    assert_close_rows(stepwise(made, ids), stepwise(reference, ids), FORMAT_TOLERANCE["int8"])
    tokens, sizes = 4096, []
    for each in (weights, exact):
        formats = {name: weight.format for name, weight in each.items() if isinstance(weight, PackedMatrix)}
        sizes.append(backend.buffer_bytes(graph, formats, CompileOptions(), tokens, 4))
    raised = tokens * 48 * 4
    assert 0.8 * raised < sizes[0] - sizes[1] <= raised  # another product has a little more scratch memory than these two


def test_description(backend, llama):
    made, _ = pair(backend, llama, "int8")
    rows = made.plan.describe()
    assert [row["op"] for row in rows] == [node.op for node in made.plan.graph.nodes]
    head = rows[-1]
    assert head["format"] == "int8" and head["bytes"] == 2 * 2 * 544 and head["weights"] == ["lm_head.weight"]


def test_tokens_are_chosen_as_defined(backend, llama):
    made, _ = pair(backend, llama)
    logits = torch.randn(3, 31, generator=torch.Generator().manual_seed(1))
    choices = [GREEDY, None, TokenChoice(0.7, top_k=5, u=0.4)]
    assert made.plan.choose_tokens(logits, choices) == choose_tokens(logits.numpy(), choices)


def test_what_is_missing_is_named(backend, monkeypatch):
    """Of a family whose op has no kernels, as a new one would not."""
    monkeypatch.setattr(supported, "OPS", tuple(op for op in supported.OPS if op != "short_conv"))
    model = random_model(CASES["lfm2-mixed"]())
    said = "the cuda backend does not run op 'short_conv' of family 'lfm2' yet; load the model with backend=\"reference\""
    with pytest.raises(BackendError, match=said):
        backend.compile(graph_of(model), packed_weights(weights_of(model), "fp32"))


def test_weights_that_do_not_fit_are_named(backend, llama, monkeypatch):
    monkeypatch.delitem(LAYOUTS, "q5_1")  # as if this format had no kernels
    graph, weights = graph_of(llama), packed_weights(weights_of(llama), "fp32")
    name = "model.layers.0.self_attn.q_proj.weight"
    matrix = unpack(weights[name])
    for wrong, said in (
        (matrix, "must be packed for the cuda backend"),
        (pack(matrix[:32], "fp32"), r"has shape \(32, 40\), but the graph needs \(40, 40\)"),
        (pack(matrix, "q5_1"), "weight format 'q5_1' of .*choose precision among fp32, bf16, int8, int4"),
        (PackedMatrix("fp32", 40, 40, weights[name].data, ColumnOrder(2, 4)), "another order of columns"),
    ):
        with pytest.raises(BackendError, match=said):
            backend.compile(graph, {**weights, name: wrong})
    with pytest.raises(BackendError, match=f"the graph needs weight '{name}'"):
        backend.compile(graph, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(
        BackendError, match="does not support KV cache dtype 'int4' of family 'llama'; choose kv_cache among fp32, bf16"
    ):
        backend.new_store(graph, "int4", 2)


def test_stores_of_other_backends_are_refused(backend, llama):
    made, exact = pair(backend, llama)
    with pytest.raises(BackendError, match="store: the plan needs a CudaStore of its backend, got a TorchStore"):
        run_step(made.plan, exact.store, [Part(made.sequence(), [1])])


def test_capabilities(backend):
    able = backend.capabilities
    assert able.weight_formats == tuple(LAYOUTS) and able.kv_dtypes == ("fp32", "bf16", "int8", "fp8")
    assert able.adapters and not (able.training or able.decode_calls or able.dense_operations or able.batch_invariant)
    assert backend.detail == "Triton's interpreter on cpu"


def test_operations_on_tensors(backend, llama):
    """What models without a plan call; what is missing is refused by name."""
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1))
    weights = packed_weights(weights_of(llama), "fp32")
    gate, up, down = (weights[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    scale, reference = torch.rand(40) + 0.5, ReferenceBackend()
    for norm in (None, (scale, None, 1e-5)):
        for residual in (False, True):
            args = (x, [(gate, None), (up, torch.ones(48))], "swiglu", (down, None))
            made, exact = (b.feed_forward(*args, norm=norm, residual=residual) for b in (backend, reference))
            torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    made, exact = (b.norm(x, scale, scale, 1e-5) for b in (backend, reference))
    torch.testing.assert_close(made, exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(backend.unpack(gate), unpack(gate))
    for call, said in (
        (lambda: backend.feed_forward(x, [(up, None)], "relu", (down, None)), "feed-forward blocks with op 'relu'"),
        (lambda: backend.linear_gradient(x, down), "gradients"),
        (lambda: backend.attend(x, x, x, 1.0), "attention without a cache"),
    ):
        with pytest.raises(BackendError, match=f"the cuda backend does not have {said} yet"):
            call()
