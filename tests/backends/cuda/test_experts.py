"""Routing, grouping and products of experts equal the reference's functions, for every format and odd shapes."""

from __future__ import annotations

import pytest
import torch

from support import triton_interpreter

triton_interpreter.require()

from deepseek_optimizer.backends.cuda.division import MOST_ROWS, most_pair_tiles
from deepseek_optimizer.backends.cuda.kernels import elementwise, expert_groups, experts, routing
from deepseek_optimizer.backends.cuda.layouts import LAYOUTS
from deepseek_optimizer.backends.cuda.matrices import DeviceStack
from deepseek_optimizer.backends.reference import moe, ops
from deepseek_optimizer.quant import pack, unpack
from deepseek_optimizer.quant.packed import PackedStack

from .values import random

CPU = torch.device("cpu")
# Of the largest output: few tokens are multiplied in fp32, more on tensor cores, twice in a row.
VECTOR_BOUND = 3e-6
TILE_BOUND = dict.fromkeys(LAYOUTS, 2**-6) | {"fp32": 3e-6}


def some_routes(tokens: int, experts_count: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = random(tokens, experts_count, seed=seed)
    chosen = scores.topk(top_k).indices.sort(-1).values
    return torch.cat((chosen.float(), random(tokens, top_k, seed=seed + 1)), -1)


def stack(count: int, rows: int, cols: int, format_name: str, seed: int) -> PackedStack:
    matrices = [pack(m, format_name).data for m in random(count, rows, cols, seed=seed) * cols**-0.5]
    return PackedStack(format_name, count, rows, cols, torch.stack(matrices))


def values(packed: PackedStack) -> torch.Tensor:
    return torch.stack([unpack(packed.matrix(i)) for i in range(packed.count)])


ROUTINGS = {
    "softmax": {"scoring": "softmax", "groups": 1, "top_groups": 1, "group_score": "max", "normalize": False, "scale": 1.0},
    "normalized": {"scoring": "softmax", "groups": 1, "top_groups": 1, "group_score": "max", "normalize": True, "scale": 1.7},
    "best of groups": {
        "scoring": "softmax",
        "groups": 3,
        "top_groups": 2,
        "group_score": "max",
        "normalize": False,
        "scale": 16.0,
    },
    "two of groups": {
        "scoring": "sigmoid",
        "groups": 3,
        "top_groups": 2,
        "group_score": "top2",
        "normalize": True,
        "scale": 2.5,
    },
}


ROUTINGS["square roots"] = ROUTINGS["normalized"] | {"scoring": "sqrtsoftplus"}


def test_experts_by_table():
    """Whatever their scores are: also so small that 1 + e^x is 1 in fp32."""
    scores, ids = random(5, 9) * 3, torch.tensor([3, 0, 3, 1, 2], dtype=torch.int32)
    scores[0] -= 30
    table = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:4] for i in range(4)])
    for scoring in ("sqrtsoftplus", "sigmoid"):
        made, options = torch.full((5, 8), torch.nan), {"scoring": scoring, "normalize": True, "scale": 1.5}
        routing.route(
            scores, None, None, made, top_k=4, groups=1, top_groups=1, group_score="max", **options,
            by_table=(ids, table.int()),
        )  # fmt: skip
        exact = moe.route_to(scores, table[ids.long()], **options)
        assert torch.equal(made[:, :4], exact[:, :4])
        torch.testing.assert_close(made, exact, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("experts_count", [18, 9])
def test_routing(name, experts_count):
    options, top_k, tokens = ROUTINGS[name], 4, 6
    scores, bias, factors = random(tokens, experts_count), random(experts_count, seed=1) * 0.3, random(experts_count, seed=2)
    for extra in ((None, None), (bias, factors)):
        made = torch.full((tokens, 2 * top_k), torch.nan)
        routing.route(scores, *extra, made, top_k=top_k, **options)
        exact = moe.route(scores, *extra, top_k=top_k, **options)
        assert torch.equal(made[:, :top_k], exact[:, :top_k])
        torch.testing.assert_close(made, exact, rtol=2e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_equal_scores_and_nan():
    """The first of equal experts and groups is chosen; whatever scores are, the chosen experts exist."""
    options = ROUTINGS["two of groups"]
    scores = torch.zeros(3, 12)
    scores[1, 7] = scores[1, 3] = 1.0
    made = torch.empty(3, 8)
    routing.route(scores, None, None, made, top_k=4, **options)
    assert torch.equal(made[:2], moe.route(scores[:2], None, top_k=4, **options))
    routing.route(torch.full((3, 12), torch.nan), None, None, made, top_k=4, **options)
    assert ((made[:, :4] >= 0) & (made[:, :4] < 12)).all()


@pytest.mark.parametrize(("tokens", "experts_count", "top_k", "block_m"), [(9, 5, 2, 4), (40, 3, 3, 16), (1, 7, 1, 16)])
def test_pairs_are_grouped_by_expert(tokens, experts_count, top_k, block_m):
    routes = some_routes(tokens, experts_count, top_k)
    made = expert_groups.group_pairs(routes, experts_count, block_m)
    expert_of = routes[:, :top_k].flatten().int()
    assert torch.equal(made.order, torch.argsort(expert_of, stable=True).int())
    covered = []
    for expert, first, count in made.fields.tolist():
        assert 0 <= count <= block_m
        pairs = made.order[first : first + count].tolist()
        assert (expert_of[pairs] == expert).all()
        covered += pairs
    assert sorted(covered) == list(range(tokens * top_k))


def test_tiles_suffice_for_the_worst_routes():
    """One pair of each expert but one, which has all others."""
    for pairs, count, block_m in ((1, 9, 16), (40, 8, 16), (1000, 8, 64), (7, 64, 16)):
        alone = min(pairs, count) - 1
        assert most_pair_tiles(pairs, count, block_m) >= alone + -(-(pairs - alone) // block_m)
    assert most_pair_tiles(4096 * 8, 256, 64) == 512 + 252


@pytest.mark.parametrize("tokens", [2, 23])
@pytest.mark.parametrize("format_name", ["fp32", "bf16", "int8", "int4", "fp8", "mxfp4", "q4_k", "int3"])
def test_products_of_experts(format_name, tokens):
    count, top_k, width, inner = (5, 2, 40, 35) if format_name != "q4_k" else (3, 2, 256, 256)
    routes, x = some_routes(tokens, count, top_k, seed=3), random(tokens, width, seed=5)
    first, second = stack(2 * count, inner, width, format_name, 6), stack(count, width, inner, format_name, 7)
    gate_up, down = DeviceStack(first, CPU), DeviceStack(second, CPU)
    tiles = experts.group_for(routes, count, gate_up)
    assert (tiles is None) == (tokens <= MOST_ROWS)
    hidden, out = torch.full((tokens * top_k, inner), torch.nan), torch.full((tokens, width), torch.nan)
    experts.gate_up(x, routes, tiles, gate_up, hidden)
    experts.down(hidden, routes, tiles, down, out)
    dense = values(first).double().unflatten(0, (count, 2)).flatten(1, 2)
    wide = routes.double()
    exact = moe.gate_up(x.double(), wide, dense, False)
    bound = VECTOR_BOUND if tiles is None else TILE_BOUND[format_name]
    assert (hidden - exact).abs().max() <= bound * exact.abs().max()
    total = moe.down(hidden.double(), wide, values(second).double(), False)
    assert (out - total).abs().max() <= bound * total.abs().max()


@pytest.mark.parametrize("tokens", [2, 23])
def test_experts_that_weigh_their_inputs(tokens):
    count, top_k, width, inner = 3, 2, 40, 35
    routes, x = some_routes(tokens, count, top_k, seed=3), random(tokens, width, seed=5)
    first, second = stack(2 * count, inner, width, "fp32", 6), stack(count, width, inner, "fp32", 7)
    gate_up, down = DeviceStack(first, CPU), DeviceStack(second, CPU)
    tiles = experts.group_for(routes, count, gate_up)
    hidden, out = torch.full((tokens * top_k, inner), torch.nan), torch.full((tokens, width), torch.nan)
    experts.gate_up(x, routes, tiles, gate_up, hidden, weighed=True)
    experts.down(hidden, routes, tiles, down, out, weighed=True)
    dense, wide = values(first).double().unflatten(0, (count, 2)).flatten(1, 2), routes.double()
    exact = moe.gate_up(x.double(), wide, dense, False, weigh_input=True)
    assert (hidden - exact).abs().max() <= VECTOR_BOUND * exact.abs().max()
    total = moe.down(hidden.double(), wide, values(second).double(), False, weigh_input=True)
    assert (out - total).abs().max() <= VECTOR_BOUND * total.abs().max()


def test_grouped_sums_do_not_depend_on_other_tokens():
    """Experts without tokens, one with many tiles, and tiles of several sizes."""
    count, top_k = 6, 2
    routes = torch.tensor([[1.0, 4.0, 0.5, 2.0]] * 37 + [[0.0, 1.0, 1.0, 1.0], [4.0, 5.0, 1.0, -1.0]])
    x, packed = random(39, 33), stack(count, 20, 33, "fp32", 1)
    weights, hidden = DeviceStack(packed, CPU), x.repeat_interleave(top_k, 0)
    exact = moe.down(hidden.double(), routes.double(), values(packed).double(), False)
    for block_m in (16, 32):
        out = torch.full((39, 20), torch.nan)
        experts.down(hidden, routes, expert_groups.group_pairs(routes, count, block_m), weights, out)
        assert (out - exact).abs().max() <= VECTOR_BOUND * exact.abs().max()


@pytest.mark.parametrize("gates", [1, 300])
def test_sigmoid_gate(gates):
    x, gate = random(7, 300), random(7, gates, seed=1)
    exact = ops.sigmoid_gate(x, gate)
    elementwise.sigmoid_gate(x, gate, x)
    torch.testing.assert_close(x, exact, rtol=2e-6, atol=2e-6)
