"""Plans whose routed experts run on the CPU equal the reference backend's, and copy rows beside the device's work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.base import DECODE, CompileOptions
from deepseek_optimizer.backends.cpu import CpuBackend
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_mtp_graph
from deepseek_optimizer.quant.packed import PackedStack
from support import family_configs as configs
from support.models import assert_close_rows, random_ids, random_model, random_weights, weights_of
from support.recording_device import RecordingDevice
from support.steps import Part, Runner, run_step, runner

from ..cpu.packing import dequantized, packed_weights
from .plans import BF16_CACHE, FORMAT_TOLERANCE, check_mixed_steps_of, graph_of, stepwise

CPU = torch.device("cpu")
LATENT = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": None, "first_k_dense_replace": 0, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 20,
}  # fmt: skip
TINY = {
    "vocab_size": 31, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "deepseek_v2": lambda: configs.deepseek_v2(**LATENT),
    "deepseek_v3": lambda: configs.deepseek_v3(**LATENT, n_group=3, topk_group=2),
    "qwen2_moe": lambda: configs.qwen2_moe(**TINY, num_experts=5, moe_intermediate_size=20),  # has a shared expert
    "qwen3_moe": lambda: configs.qwen3_moe(**TINY, num_experts=5, moe_intermediate_size=20, norm_topk_prob=True),
    "qwen3_moe-two": lambda: configs.qwen3_moe(**TINY | {"num_hidden_layers": 2}, num_experts=5, moe_intermediate_size=20),
    "gpt_oss": lambda: configs.gpt_oss(
        **TINY | {"intermediate_size": 20}, num_local_experts=4, layer_types=["sliding_attention"], sliding_window=9
    ),
}


def stacks(graph):
    return [node.weights[0] for node in graph.nodes if node.op == "experts_gate_up"]


def one_thread():
    return CpuBackend(threads=1)


def backend_of(seam=None):
    return CudaBackend(CPU, seam=seam, host=one_thread)


def pair(model, on_host, format_name="fp32", kv="fp32"):
    """A runner with the first `on_host` layers' experts on the CPU, and one of the reference with the same values."""
    graph, weights, backend = graph_of(model), packed_weights(weights_of(model), format_name), backend_of()
    options = CompileOptions(host_experts=tuple(stacks(graph)[:on_host]))
    made, exact = backend.compile(graph, weights, options), ReferenceBackend().compile(graph, dequantized(weights))
    groups = (None,) * graph.cache.groups
    return [
        Runner(made, backend.new_store(graph, kv, 24), groups),
        Runner(exact, ReferenceBackend().new_store(graph, "fp32", 24), groups),
    ]


@pytest.mark.parametrize(
    ("family", "on_host", "format_name", "kv"),
    [
        ("deepseek_v3", 1, "int4", "bf16"),
        ("deepseek_v2", 1, "bf16", "fp32"),
        ("qwen3_moe-two", 1, "fp32", "fp32"),
        ("qwen3_moe-two", 2, "int4", "fp32"),
        ("gpt_oss", 1, "bf16", "fp32"),
    ],
)
def test_logits_are_those_of_the_reference(family, on_host, format_name, kv):
    """Prompts in two chunks, then a step of decoding."""
    model = random_model(FAMILIES[family]())
    made, exact = pair(model, on_host, format_name, kv)
    ids = random_ids(model.config, 10)
    tolerance = FORMAT_TOLERANCE[format_name] if kv == "fp32" else max(FORMAT_TOLERANCE[format_name], BF16_CACHE)
    assert_close_rows(stepwise(made, ids), stepwise(exact, ids), tolerance)


def test_mixed_steps():
    """Rows that decode come first on both sides."""
    model = random_model(FAMILIES["qwen2_moe"]())
    check_mixed_steps_of(pair(model, 1), model)


def test_layers_for_several_tokens():
    graph = rules.apply(build_mtp_graph(FAMILIES["deepseek_v3"](), 0, 1))[0]
    weights = packed_weights(random_weights(graph, 4), "fp32")
    plans = [
        runner(backend_of(), graph, weights, blocks=4, options=CompileOptions(host_experts=tuple(stacks(graph)))),
        runner(ReferenceBackend(), graph, dequantized(weights), blocks=4),
    ]
    states, outputs = torch.randn(6, graph.draft_width, generator=torch.Generator().manual_seed(2)), []
    for run in plans:
        outputs.append(run_step(run.plan, run.store, [Part(run.sequence(), [4, 3, 2, 1, 5, 6])], states=states))
    assert len(stacks(graph)) == 1
    assert_close_rows(outputs[0].logits, outputs[1].logits, FORMAT_TOLERANCE["fp32"])


def decoding(model, on_host, device, captured=True):
    """The logits of four steps of three sequences, which are padded to four rows; and what each step did."""
    graph, weights = graph_of(model), packed_weights(weights_of(model), "fp32")
    backend = CudaBackend(CPU, captured, device, one_thread)
    plan = backend.compile(graph, weights, CompileOptions(host_experts=tuple(stacks(graph)[:on_host])))
    run = Runner(plan, backend.new_store(graph, "fp32", 24), (None,) * graph.cache.groups)
    texts, logits, events = [(run.sequence(), random_ids(model.config, 6, seed)) for seed in range(3)], [], []
    run_step(run.plan, run.store, [Part(s, ids[:2], rows=[]) for s, ids in texts])
    for place in range(2, 6):
        device.events.clear()
        logits.append(run_step(run.plan, run.store, [Part(s, [ids[place]], DECODE) for s, ids in texts]).logits)
        events.append([event for event in device.events if not event.startswith("torch.")])
    return torch.cat(logits), events


@pytest.mark.parametrize(
    ("family", "on_host", "replays"),
    [
        # The device has the shared experts' piece to do between a layer's mark and the host's wait for it.
        ("qwen2_moe", 1, ["replay 0", "download", "mark", "replay 1", "arrived", "upload", "replay 2"]),
        ("qwen3_moe", 1, ["replay 0", "download", "mark", "arrived", "upload", "replay 1"]),
    ],
)
def test_steps_are_captured_in_pieces(family, on_host, replays):
    model = random_model(FAMILIES[family]())
    made, events = decoding(model, on_host, RecordingDevice())
    exact, _ = decoding(model, on_host, RecordingDevice(), captured=False)
    assert torch.equal(made, exact)
    assert events[1][:2] == ["upload", "capture"] and events[1].count("capture") == sum("replay" in each for each in replays)
    assert events[2] == events[3] == ["upload", *replays, "download", "wait"]


def test_longer_steps_keep_captured_ones_valid():
    """Memory for rows that cross grows; what was captured does not refer to it."""
    model = random_model(FAMILIES["qwen3_moe"]())
    graph, weights, results = graph_of(model), packed_weights(weights_of(model), "fp32"), []
    for captured in (True, False):
        backend = CudaBackend(CPU, captured, RecordingDevice(), one_thread)
        plan = backend.compile(graph, weights, CompileOptions(host_experts=tuple(stacks(graph))))
        run = Runner(plan, backend.new_store(graph, "fp32", 24), (None,) * graph.cache.groups)
        for count in (1, 1, 5, 1):
            sequence = run.sequence()
            results.append(run_step(plan, run.store, [Part(sequence, [2] * count, DECODE, rows=[count - 1])]).logits)
            sequence.free()
    assert all(map(torch.equal, results[:4], results[4:]))


def test_description_and_errors():
    model = random_model(FAMILIES["qwen3_moe"]())
    graph, weights, backend = graph_of(model), packed_weights(weights_of(model), "int8"), backend_of()
    names = stacks(graph)
    assert "experts on the CPU" not in backend.detail
    plan = backend.compile(graph, weights, CompileOptions(host_experts=tuple(names)))
    (row,) = [row for row in plan.describe() if row["op"] == "experts_receive"]
    held = [weight for weight in weights.values() if isinstance(weight, PackedStack)]
    assert row["kernel"] == "cpu" and row["format"] == "int8" and row["bytes"] == sum(weight.nbytes for weight in held)
    assert "; experts on the CPU (" in backend.detail
    plan.check_weights()
    with backend.thread_context():
        assert torch.get_num_threads() == 1
    options = CompileOptions(host_experts=tuple(names))
    with pytest.raises(BackendError, match="created without a backend for it"):
        CudaBackend(CPU).compile(graph, weights, options)
    stack = weights[names[0]]
    elsewhere = {**weights, names[0]: replace(stack, data=stack.data.to("meta"))}
    with pytest.raises(BackendError, match=r"gate_up_proj' is to be computed on the CPU, but is on meta; move it"):
        backend.compile(graph, elsewhere, options)
