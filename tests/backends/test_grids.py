"""Attention with relative positions over grids of patches, and padding: against formulas, and layers of SAM against
Transformers' on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cpu.native import isa_names, isa_runs_here
from deepseek_optimizer.backends.reference import ReferenceBackend, grids
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.partial_graph import graph_between
from deepseek_optimizer.graph.validate import check_graph
from deepseek_optimizer.models import build_tower
from support.encoders import make_batch
from support.models import assert_close_rows

from .cpu.packing import packed_weights

NATIVE = cpu.unavailable_reason() is None
ISAS = [name for name in isa_names() if isa_runs_here(name)] if NATIVE else []
HEADS, DIM = 3, 10


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(rows, cols):
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols))


def test_products_of_longer_heads_are_scores_with_relative_positions():
    """By a loop over pairs of patches."""
    rows, cols, scale = 2, 3, 0.3
    at, x, k = places(rows, cols), randn(6, HEADS * DIM, seed=1), randn(6, HEADS * DIM, seed=2)
    by_row, by_col = randn(2 * rows - 1, DIM, seed=3), randn(2 * cols - 1, DIM, seed=4)
    queries = grids.grid_queries(x, at, by_row, by_col, HEADS, scale, 16).view(6, HEADS, 16)
    keys = grids.grid_keys(k, at, rows, cols, HEADS, 16).view(6, HEADS, 16)
    for a in range(6):
        for b in range(6):
            down, across = (at[a] - at[b]).tolist()
            for head in range(HEADS):
                q, own = x.view(6, HEADS, DIM)[a, head], k.view(6, HEADS, DIM)[b, head]
                expected = scale * q @ own + q @ by_row[down + rows - 1] + q @ by_col[across + cols - 1]
                torch.testing.assert_close(queries[a, head] @ keys[b, head], expected, atol=1e-5, rtol=1e-5)


def test_zero_padding():
    x = randn(3, 4)
    made = grids.zero_padding(x, torch.tensor([False, True, False]))
    assert torch.equal(made[[0, 2]], x[[0, 2]]) and not made[1].any()


def random_sam(**fields):
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(**{
        "hidden_size": 3 * 18, "mlp_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 20 * 4,
        "patch_size": 4, "window_size": 3, "global_attn_indexes": [], "output_channels": 8, **fields,
    })  # fmt: skip
    model = SamVisionModel(config).eval().vision_encoder
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=seed)
    return model


def plan_of(backend, model, weight_format="fp32", activation="auto"):
    graph, _ = rules.apply(graph_between(build_tower(model.config).graph, 0, model.config.num_hidden_layers), None)
    check_graph(graph)
    weights = {name: model.get_parameter(name).data for name in graph.weights()}
    tables = {name: weights.pop(name) for name in list(weights) if "rel_pos" in name}
    given = weights if backend.name == "reference" else packed_weights(weights, weight_format)
    return backend.compile(graph, {**given, **tables}, CompileOptions(activation=activation))


def step_of(x, axes, lengths):
    batch = make_batch(x, lengths)
    batch.axes = axes.numpy().astype(np.int32)
    return batch


def windows_with_padding(window, real, count):
    """(x, axes): windows of which only the first `real` rows and columns are no padding."""
    at = places(window, window)
    padding = (at >= real).any(-1)
    axes = torch.cat([padding[:, None].long(), at], 1).repeat(count, 1)
    return randn(count * window * window, 54, seed=5), axes, padding


@pytest.mark.parametrize("name", ["reference", *ISAS])
@pytest.mark.parametrize(("window", "real"), [(3, 3), (14, 5), (20, 19), (35, 35)])
def test_layers_equal_those_of_transformers(name, window, real):
    """In windows of several sizes, some of whose rows are padding, which counts as keys."""
    model = random_sam(window_size=window)
    count = 2
    x, axes, padding = windows_with_padding(window, real, count)
    backend = ReferenceBackend() if name == "reference" else cpu.CpuBackend(cpu.exact(name), threads=2)
    made = plan_of(backend, model).run(step_of(x, axes, [window * window] * count), None).hidden[-1]
    inside = x.view(count, window, window, -1)[:, :real, :real]
    with torch.no_grad():
        expected = model.layers[0](inside)
    kept = made.view(count, -1, 54)[:, ~padding].view(count, real, real, -1)
    assert_close_rows(kept.flatten(0, 2), expected.flatten(0, 2))


@pytest.mark.skipif(not NATIVE, reason="no native build")
@pytest.mark.parametrize("formats", [("fp32", "auto"), ("int8", "int8")], ids=["fp32", "int8"])
def test_bits_do_not_depend_on_batch_threads_or_isa(formats):
    model = random_sam(num_hidden_layers=2, window_size=7)
    x, axes, _ = windows_with_padding(7, 5, 4)
    whole = None
    for name in ISAS:
        for threads in (1, 3):
            plan = plan_of(cpu.CpuBackend(cpu.exact(name), threads=threads), model, *formats)
            made = plan.run(step_of(x, axes, [49] * 4), None).hidden[-1]
            whole = made if whole is None else whole
            assert torch.equal(made, whole), (name, threads)
            alone = plan.run(step_of(x[49:98], axes[49:98], [49]), None).hidden[-1]
            assert torch.equal(alone, whole[49:98])


@pytest.mark.parametrize("name", ["reference", *ISAS[:1]])
def test_places_outside_of_the_grid(name):
    backend = ReferenceBackend() if name == "reference" else cpu.CpuBackend(cpu.exact(name), threads=1)
    plan = plan_of(backend, random_sam())
    x, axes, _ = windows_with_padding(3, 3, 1)
    for at in ((4, 1, 3), (0, 2, -1)):
        outside = axes.clone()
        outside[at[0], at[1]] = at[2]
        with pytest.raises((BackendError, ValueError), match=r"axes.* grid of 3 x 3"):
            plan.run(step_of(x, outside, [9]), None)
    missing = step_of(x, axes, [9])
    missing.axes = None
    with pytest.raises((BackendError, ValueError), match="axes"):
        plan.run(missing, None)
