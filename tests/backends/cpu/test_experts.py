"""Experts in native plans against Transformers' modules: routing, every format, grouped or not, independent of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch
from deepseek_optimizer.backends.cpu import CpuBackend, exact, unavailable_reason
from deepseek_optimizer.backends.cpu.lower import lower
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import pack
from deepseek_optimizer.quant.packed import PackedStack
from support.family_configs import gpt_oss
from support.models import assert_close_rows, randomize

from .packing import dequantized, packed_weights

HIDDEN, INNER = 72, 40  # not multiples of 16 and 32
SIZES = {
    "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": INNER, "num_attention_heads": 4,
    "vocab_size": 9,
}  # fmt: skip

V2, V3 = DeepseekV2Config, DeepseekV3Config
CONFIGS: dict[str, Any] = {
    "v2-greedy": lambda: V2(
        **SIZES, n_routed_experts=7, num_experts_per_tok=3, n_shared_experts=2, topk_method="greedy", routed_scaling_factor=1.5
    ),
    "v2-groups": lambda: V2(
        **SIZES, n_routed_experts=12, num_experts_per_tok=4, n_shared_experts=1, topk_method="group_limited_greedy", n_group=4,
        topk_group=2, routed_scaling_factor=16.0,
    ),
    "v3-groups": lambda: V3(
        **SIZES, n_routed_experts=16, num_experts_per_tok=5, n_shared_experts=1, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    "v3-one-group": lambda: V3(
        **SIZES, n_routed_experts=5, num_experts_per_tok=5, n_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
}  # fmt: skip


def random_layer(config: Any, seed: int = 0) -> torch.nn.Module:
    """The module with random weights, and a correction bias that matters."""
    layer = (DeepseekV2Moe if isinstance(config, V2) else DeepseekV3MoE)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * (0.2 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5))
    return layer


def moe_graph(config: Any, grouped: bool = True) -> Graph:
    """x (given as embeddings) -> experts + shared experts -> hidden state 0; the head exists because a graph needs one."""
    v3 = isinstance(config, V3)
    limited = v3 or config.topk_method == "group_limited_greedy"
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    x, y = Value("x", HIDDEN), Value("y", HIDDEN)
    routes, h = Value("routes", 2 * top_k), Value("h", INNER, repeat=top_k)
    gate, up, shared = (Value(n, INNER * config.n_shared_experts) for n in ("gate", "up", "shared"))
    routed, down = Value("routed", HIDDEN), Value("down", HIDDEN)
    which = {"experts": experts, "top_k": top_k, "grouped": grouped}
    routing = {
        "bias": "gate.e_score_correction_bias" if v3 else None, "experts": experts, "top_k": top_k,
        "groups": config.n_group if limited else 1, "top_groups": config.topk_group if limited else 1,
        "scoring": "sigmoid" if v3 else "softmax", "group_score": "top2" if v3 else "max",
        "normalize": v3 and config.norm_topk_prob, "scale": config.routed_scaling_factor,
    }  # fmt: skip
    one = {"biases": (None,)}
    nodes = [
        Node("embedding", (), (x,), ("embed",), {"scale": 1.0}),
        Node("router", (x,), (routes,), ("gate.weight",), routing),
        Node("experts_gate_up", (x, routes), (h,), ("experts.gate_up_proj",), which),
        Node("linear", (x,), (gate,), ("shared_experts.gate_proj.weight",), one),
        Node("linear", (x,), (up,), ("shared_experts.up_proj.weight",), one),
        Node("swiglu", (gate, up), (shared,)),
        Node("experts_down", (h, routes), (routed,), ("experts.down_proj",), which),
        Node("linear", (shared,), (down,), ("shared_experts.down_proj.weight",), one),
        Node("add", (routed, down), (y,)),
        Node("hidden_out", (y,), (), (), {"index": 0}),
        Node("lm_head", (y,), (Value("logits", 9),), ("embed",), {"bias": None}),
    ]
    return Graph("moe", nodes, 9, HIDDEN, 1, CacheSpec(1, 1, 2), 64)


def packed(layer: torch.nn.Module, format_name: str, down: str | None = None) -> dict[str, Any]:
    """The weights of a plan; the router's stays a float tensor."""
    weights: dict[str, Any] = packed_weights(layer.state_dict(), format_name)
    if down:
        weights["experts.down_proj"] = packed_weights(layer.state_dict(), down)["experts.down_proj"]
    return weights | {"embed": pack(torch.zeros(9, HIDDEN), "fp32")}


def dequantized_layer(layer: torch.nn.Module, weights: dict[str, Any]) -> torch.nn.Module:
    """The same module with the dequantized weights."""
    layer.load_state_dict({n: w for n, w in dequantized(weights).items() if n != "embed"})
    return layer


class Plan:
    """Runs rows x [T, HIDDEN]; returns y."""

    def __init__(self, backend: CpuBackend, graph: Graph, weights: dict[str, Any], **options: Any) -> None:
        self.plan = backend.compile(graph, weights, **options)
        self.store = backend.new_store(graph, "fp32", 1)

    def __call__(self, x: torch.Tensor, decode: int = 0) -> torch.Tensor:
        """The first `decode` rows are sequences in decode phase, the others one sequence in prefill phase."""
        lengths = [1] * decode + ([len(x) - decode] if decode < len(x) else [])
        zeros = np.zeros(len(lengths), np.int32)
        phase = np.asarray([DECODE if i < decode else PREFILL for i in range(len(lengths))], np.int32)
        rows = np.zeros(len(x), np.int32)
        batch = StepBatch(
            rows, rows, np.asarray(lengths, np.int32), zeros, phase, zeros[:, None], rows[:0], inputs_embeds=x, hidden=True
        )
        return self.plan.run(batch, self.store).hidden[0]


def inputs(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x[None])[0]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("case", CONFIGS)
def test_fp32_equals_transformers(backend, case, grouped):
    config = CONFIGS[case]()
    layer = random_layer(config)
    plan = Plan(backend, moe_graph(config, grouped), packed(layer, "fp32"))
    x = inputs(300)
    want = expected(layer, x)
    for rows, decode in ((1, 0), (1, 1), (6, 3), (67, 0), (300, 20)):
        assert_close_rows(plan(x[:rows], decode), want[:rows], 1e-5)


# Tolerance of a format's arithmetic against the same values in fp32: a property of its activations.
FORMAT_TOLERANCE = {
    "fp32": 1e-5,
    "bf16": 2e-2,
    "int8": 1e-3,
    "int8_nested": 1e-3,
    "int4_nested": 6e-2,
    "q4_1": 1e-3,
    "int4": 6e-2,
    "mxfp4": 6e-2,
}


@pytest.mark.parametrize("format_name", FORMAT_TOLERANCE)
def test_formats_against_their_dequantized_values(backend, format_name):
    config = CONFIGS["v3-groups"]()
    layer = random_layer(config)
    weights = packed(layer, format_name)
    x = inputs(150)
    want = expected(dequantized_layer(layer, weights), x)
    assert_close_rows(Plan(backend, moe_graph(config), weights)(x, 40), want, FORMAT_TOLERANCE[format_name])


def test_experts_and_the_rest_in_different_formats(backend):
    config = CONFIGS["v2-greedy"]()
    layer = random_layer(config)
    weights = packed(layer, "int8", down="bf16") | {n: w for n, w in packed(layer, "int4").items() if "shared" in n}
    x = inputs(40)
    want = expected(dequantized_layer(layer, weights), x)
    assert_close_rows(Plan(backend, moe_graph(config), weights)(x), want, FORMAT_TOLERANCE["int4"])


@pytest.mark.parametrize("format_name", FORMAT_TOLERANCE)
def test_a_row_does_not_depend_on_the_batch(isa, format_name):
    """Alone, in a batch, with rows of either phase, grouped or not, on any number of threads: torch.equal."""
    config = CONFIGS["v2-groups"]()
    weights = packed(random_layer(config), format_name)
    x = inputs(260)
    first = Plan(CpuBackend(isa=exact(isa), threads=1), moe_graph(config), weights)
    prefill, decode = first(x), first(x, 260)
    assert torch.equal(prefill[:3], torch.cat([first(x[i : i + 1]) for i in range(3)]))
    assert torch.equal(decode[:3], torch.cat([first(x[i : i + 1], 1) for i in range(3)]))
    assert torch.equal(prefill[200:231], first(x[200:231]))
    for threads in (1, 2, 5, 40):
        for grouped in (True, False):
            plan = Plan(CpuBackend(isa=exact(isa), threads=threads), moe_graph(config, grouped), weights)
            assert torch.equal(plan(x, 90), torch.cat([decode[:90], prefill[90:]]))
            assert torch.equal(plan(x[7:90], 4), torch.cat([decode[7:11], prefill[11:90]]))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("format_name", FORMAT_TOLERANCE)
@pytest.mark.parametrize("sizes", [(72, 44, 6, 2), (40, 17, 3, 3), (33, 100, 5, 1)])
def test_biases_and_clamped_activation(backend, sizes, format_name, grouped):
    """gpt-oss's experts and router: every row of a batch against Transformers' module."""
    hidden, inner, experts, top_k = sizes
    fields = {"intermediate_size": inner, "num_local_experts": experts, "num_experts_per_tok": top_k, "swiglu_limit": 0.8}
    config = gpt_oss(hidden_size=hidden, num_hidden_layers=1, **fields)
    config._experts_implementation = "eager"
    layer = randomize(GptOssMLP(config).eval())
    graph = experts_graph(config, grouped)
    weights = packed_weights({f"model.layers.0.mlp.{n}": w for n, w in layer.state_dict().items()}, format_name)
    router = "model.layers.0.mlp.router.weight"
    weights |= {router: layer.router.weight, "embed": pack(torch.zeros(9, hidden), "fp32")}
    values = {n.removeprefix("model.layers.0.mlp."): w for n, w in dequantized(weights).items() if n != "embed"}
    layer.load_state_dict(values)
    x = torch.randn(90, hidden, generator=torch.Generator().manual_seed(2))
    want = layer(x[None])[0][0].detach()
    plan = Plan(backend, graph, weights)
    for rows, decode in ((1, 0), (1, 1), (6, 3), (90, 20)):
        assert_close_rows(plan(x[:rows], decode), want[:rows], FORMAT_TOLERANCE[format_name])


def experts_graph(config: Any, grouped: bool) -> Graph:
    """x (given as embeddings) -> the family's experts -> hidden state 0."""
    nodes = [n for n in build_graph(config).nodes if n.op in ("router", "experts_gate_up", "experts_down")]
    nodes = [n.with_(attrs={**n.attrs, "grouped": grouped}) if n.op != "router" else n for n in nodes]
    x, y, hidden = nodes[0].inputs[0], nodes[-1].outputs[0], config.hidden_size
    nodes = [
        Node("embedding", (), (x,), ("embed",), {"scale": 1.0}),
        *nodes,
        Node("hidden_out", (y,), (), (), {"index": 0}),
        Node("lm_head", (y,), (Value("logits", 9),), ("embed",), {"bias": None}),
    ]
    return Graph("experts", nodes, 9, hidden, 1, CacheSpec(1, 1, 2), 64)


def test_all_tokens_to_the_same_experts(backend):
    config = CONFIGS["v3-groups"]()
    layer = random_layer(config)
    layer.gate.e_score_correction_bias[:5] = 10.0
    x = inputs(200)
    assert_close_rows(Plan(backend, moe_graph(config), packed(layer, "fp32"))(x), expected(layer, x), 1e-5)


def test_one_token_is_nan(backend):
    config = CONFIGS["v3-groups"]()
    plan = Plan(backend, moe_graph(config), packed(random_layer(config), "int4"))
    x = inputs(20)
    whole = plan(x)
    x[7, 3] = torch.nan
    broken = plan(x)
    assert broken[7].isnan().all()
    others = [i for i in range(20) if i != 7]
    assert torch.equal(broken[others], whole[others])


def test_one_conversion_serves_routed_and_shared_experts():
    graph = moe_graph(CONFIGS["v3-groups"]())
    formats = {"gate.weight": "fp32", "embed": "fp32"}
    lowered = lower(graph, lambda w: "f32" if w in formats else "q8", lambda w: formats.get(w, "int4")).nodes
    ops = [n.op for n in lowered]
    assert ops.count("convert") == 1 and "router" not in ops
    assert ops[ops.index("route") - 1] == "linear"
    scores = lowered[ops.index("route")].inputs[0]
    assert (scores.width, scores.kind, lowered[ops.index("route") - 1].inputs[0].kind) == (16, "f32", "f32")
    gate_up, down = (lowered[ops.index(op)] for op in ("experts_gate_up", "experts_down"))
    assert gate_up.inputs[0].kind == "q8" and gate_up.inputs[1].kind == "f32"
    assert gate_up.outputs[0] == down.inputs[0] and (down.inputs[0].kind, down.inputs[0].repeat) == ("q8", 5)


@pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")
def test_descriptions_and_errors_of_the_plan():
    config = CONFIGS["v2-greedy"]()
    backend = CpuBackend(threads=1)
    weights = packed(random_layer(config), "int4")
    rows = {row["op"]: row for row in backend.compile(moe_graph(config), weights).describe()}
    stack = weights["experts.gate_up_proj"]
    assert rows["experts_gate_up"]["bytes"] == stack.nbytes and rows["experts_gate_up"]["format"] == "int4"
    assert (rows["experts_gate_up"]["writes"], rows["experts_down"]["activation"]) == ("q8", "q8")
    with pytest.raises(BackendError, match=r"needs weight 'experts\.down_proj'"):
        backend.compile(moe_graph(config), {n: w for n, w in weights.items() if n != "experts.down_proj"})
    with pytest.raises(BackendError, match=r"'experts\.gate_up_proj' must be packed"):
        backend.compile(moe_graph(config), weights | {"experts.gate_up_proj": torch.zeros(7, 80, 72)})
    half = PackedStack(stack.format, 7, stack.rows, stack.cols, stack.data[:7])
    with pytest.raises(ValueError, match="a stack of 7 matrices, must be 14"):
        backend.compile(moe_graph(config), weights | {"experts.gate_up_proj": half})
