"""The reference backend's router and experts: against Transformers, and against formulas in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

from deepseek_optimizer.backends.reference import ReferenceBackend, moe, ops
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import stack_shapes
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import PackedStack, get_format, pack
from support.models import CASES, assert_close_rows, random_ids, random_model, randomize, transformers_logits, weights_of
from support.steps import runner
from support.watch import spy

TIE = 1e-5

WITH_EXPERTS = [name for name in CASES if name.startswith("deepseek") and name != "deepseek_v2-dense"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gap(values: torch.Tensor, count: int) -> torch.Tensor:
    """The difference between the last chosen score and the first rejected one."""
    ordered = values.sort(-1, descending=True).values
    return ordered[..., count - 1] - ordered[..., count] if count < values.shape[-1] else values.new_tensor(torch.inf)


def no_tie(logits: torch.Tensor, bias: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
    """Rows whose choice of groups and experts has a margin of more than 1e-5."""
    choice = logits.softmax(-1) if options["scoring"] == "softmax" else logits.sigmoid()
    choice = choice if bias is None else choice + bias
    groups = choice.unflatten(-1, (options["groups"], -1))
    best = groups.amax(-1) if options["group_score"] == "max" else groups.topk(2, -1).values.sum(-1)
    allowed = torch.zeros_like(best).scatter(1, best.topk(options["top_groups"], -1).indices, 1).bool()
    inside = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
    return (gap(best, options["top_groups"]) > TIE) & (gap(inside, options["top_k"]) > TIE)


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_chosen_experts_equal_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sets, with their weights, in every layer and row of a whole model."""
    model = random_model(CASES[case]())
    ids, theirs = random_ids(model.config, 200), []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate") and not hasattr(layer.mlp.gate, "tid2eid"):  # which chooses by the token's id
            layer.mlp.gate.register_forward_hook(lambda _, __, output: theirs.append(output))
    transformers_logits(model, ids)
    calls = spy(monkeypatch, moe, "route")
    runner(ReferenceBackend(), build_graph(model.config), weights_of(model)).logits(ids)
    assert len(calls) == len(theirs) > 0
    distinct = set()
    for (((logits, bias), options), routes), (their_logits, weights, chosen) in zip(calls, theirs, strict=True):
        torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-4)
        order = chosen.sort(-1)
        clear = no_tie(logits, bias, options)
        assert clear.float().mean() > 0.99
        ours, shares = routes.chunk(2, -1)
        assert torch.equal(ours[clear].long(), order.values[clear])
        torch.testing.assert_close(shares[clear], weights.gather(1, order.indices)[clear], rtol=1e-4, atol=1e-5)
        distinct.update(map(tuple, ours.tolist()))
    options = calls[0][0][1]
    pairs = math.comb(calls[0][0][0][0].shape[-1], options["top_k"])
    assert len(distinct) > min(20, pairs // 2)  # routers that choose


def test_a_factor_per_expert_equals_gemma_4() -> None:
    config = CASES["gemma4_text-experts"]()
    router = Gemma4TextRouter(config).eval()
    randomize(router)
    x = randn(50, config.hidden_size)
    _, weights, chosen = router(x)
    logits = router.proj(router.norm(x) * router.scale * config.hidden_size**-0.5)
    options = {"top_k": 2, "groups": 1, "top_groups": 1, "scoring": "softmax", "group_score": "max", "normalize": True}
    routes = moe.route(logits, None, router.per_expert_scale.detach(), scale=1.0, **options)
    order = chosen.argsort(-1)
    assert torch.equal(routes[:, :2].long(), chosen.gather(-1, order))
    torch.testing.assert_close(routes[:, 2:], weights.gather(-1, order), rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    options = {"top_k": 3, "normalize": False, "scale": 1.0, "scoring": "softmax"}
    equal = torch.zeros(1, 12)
    assert moe.route(equal, None, groups=1, top_groups=1, group_score="max", **options)[0, :3].tolist() == [0, 1, 2]
    assert moe.route(equal, None, groups=6, top_groups=2, group_score="max", **options)[0, :3].tolist() == [0, 1, 2]
    bias = torch.zeros(12)
    bias[8:] = 0.1
    made = moe.route(equal, bias, groups=3, top_groups=1, group_score="top2", **{**options, "scoring": "sigmoid"})[0]
    assert made.tolist() == [8, 9, 10, 0.5, 0.5, 0.5]  # the bias affects the choice, not the weights


@pytest.mark.parametrize("limit", [0.0, 0.8])
@pytest.mark.parametrize("grouped", [False, True])
def test_experts(grouped: bool, limit: float) -> None:
    """With a limit: biases and the clamped activation of gpt-oss."""
    tokens, experts, top_k, hidden, width = 9, 7, 3, 10, 6
    x, w_in, w_out = randn(tokens, hidden), randn(experts, 2 * width, hidden, seed=1), randn(experts, hidden, width, seed=2)
    chosen = torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(tokens)])
    routes = torch.cat((chosen.sort(-1).values.float(), randn(tokens, top_k, seed=3)), -1)
    b_in, b_out = randn(experts, 2 * width, seed=4) * bool(limit), randn(experts, hidden, seed=5) * bool(limit)
    gated = partial(ops.clamped_swiglu, alpha=1.7, limit=limit, raised=True) if limit else ops.swiglu
    inner = moe.gate_up(x, routes, w_in, grouped, gated, b_in)
    made = moe.down(inner, routes, w_out, grouped, b_out)
    assert inner.shape == (tokens * top_k, width) and made.shape == (tokens, hidden)
    for t in range(tokens):
        expected = torch.zeros(hidden, dtype=torch.float64)
        for j in range(top_k):
            e, share = int(routes[t, j]), routes[t, top_k + j].double()
            gate, up = (w_in[e].double() @ x[t].double() + b_in[e].double()).chunk(2)
            h = gate * torch.sigmoid(gate) * up
            if limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                h = gate * torch.sigmoid(1.7 * gate) * (up + 1)
            torch.testing.assert_close(inner[t * top_k + j].double(), h, rtol=1e-4, atol=1e-5)
            expected += share * (w_out[e].double() @ h + b_out[e].double())
        torch.testing.assert_close(made[t].double(), expected, rtol=1e-4, atol=1e-4)


def stacked(weight: torch.Tensor, shape: tuple[int, int, int], name: str) -> PackedStack:
    matrices = weight.reshape(shape)
    return PackedStack(name, *shape, torch.stack([pack(m, name).data for m in matrices]))


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "q4_1"])
def test_packed_stacks_equal_their_dequantized_model(name: str) -> None:
    model = random_model(CASES["deepseek_v3-groups"]())
    graph, weights = rules.apply(build_graph(model.config))[0], weights_of(model)
    stacks = {n: stacked(weights[n], shape, name) for n, shape in stack_shapes(graph).items()}
    run = runner(ReferenceBackend(), graph, {**weights, **stacks})
    for n, stack in stacks.items():
        values = [get_format(name).unpack(stack.matrix(i).data, stack.rows, stack.cols) for i in range(stack.count)]
        model.get_parameter(n).data.copy_(torch.stack(values).reshape(weights[n].shape))
    ids = random_ids(model.config, 50)
    assert_close_rows(run.logits(ids), transformers_logits(model, ids))
    assert {row["format"] for row in run.plan.describe() if row["op"].startswith("experts")} == {name}


def test_a_stack_of_a_wrong_shape_is_named() -> None:
    model = random_model(CASES["deepseek_v2-groups"]())
    graph, weights, name = build_graph(model.config), weights_of(model), "model.layers.1.mlp.experts.gate_up_proj"
    short = stacked(weights[name][:11], (22, 44, 72), "bf16")
    with pytest.raises(BackendError, match=rf"{name}.*\(22, 44, 72\).*\(24, 44, 72\)"):
        ReferenceBackend().compile(graph, {**weights, name: short})
    with pytest.raises(BackendError, match=rf"{name}.*\(11, 88, 72\).*\(12, 88, 72\)"):
        ReferenceBackend().compile(graph, {**weights, name: weights[name][:11]})


def test_routers_stay_in_float32() -> None:
    """In a bf16 plan too, since their choice must not depend on the format of the other weights."""
    model = random_model(CASES["deepseek_v3-groups"]())
    plan = ReferenceBackend(dtype=torch.bfloat16).compile(build_graph(model.config), weights_of(model))
    kept = {n: w.dtype for n, w in plan._weights.items()}
    assert {n for n, dtype in kept.items() if dtype == torch.float32} == {n for n in kept if ".mlp.gate." in n}
