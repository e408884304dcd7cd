"""The plans of vision towers: as Transformers computes them, whatever the pieces, and when they do not serve a call."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.integration.bind.packed_model import OptimizerWarning
from support.multimodal import FAMILIES, make_model, make_prompts

TOLERANCE = 1e-4  # of the largest value of a row
TOWERS = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm", "janus", "deepseek_vl", "deepseek_vl_hybrid"]


def optimized(model, **settings):
    config = DeepSeekConfig(**{"precision": "fp32", "prefill_chunk": 512, **settings})
    return DynamicGraphOptimizer(copy.deepcopy(model), config=config).optimize()


def pictures_of(family, count, seed=0):
    """The arguments of `get_image_features` for pictures of odd shapes; Qwen's have random ones."""
    arguments = make_prompts(FAMILIES[family], [count], seed).arguments
    if "image_grid_thw" not in arguments:
        return {name: value for name, value in arguments.items() if "pixel" in name}
    generator = torch.Generator().manual_seed(seed)
    grid = torch.ones(count, 3, dtype=torch.long)
    grid[:, 1:] = 2 * torch.randint(1, 8, (count, 2), generator=generator)
    pixels = torch.randn(int(grid.prod(-1).sum()), arguments["pixel_values"].shape[1], generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


@torch.no_grad()
def features(model, arguments):
    """All results of the tower, flat. An optimized model must use its plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        output = model.model.get_image_features(**arguments, return_dict=True)
    found = []
    for name in ("pooler_output", "deepstack_features"):
        value = output.get(name)
        for part in () if value is None else (value,) if torch.is_tensor(value) else value:
            found += [part] if torch.is_tensor(part) else list(part)
    assert found
    return [part.flatten(0, -2) for part in found]


def assert_close(ours, theirs, tolerance=TOLERANCE):
    for one, other in zip(ours, theirs, strict=True):
        assert ((one - other).abs().amax(-1) <= tolerance * other.abs().amax(-1)).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", TOWERS)
def test_results_are_those_of_transformers(family, backend):
    model = make_model(FAMILIES[family])
    ours = optimized(model, backend=backend)
    assert ours.report().towers
    for count in range(1, 6):
        arguments = pictures_of(family, count, seed=count)
        assert_close(features(ours, arguments), features(model, arguments))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("int8", 0.05), ("int4", 1.0)])
def test_weight_formats(family, precision, tolerance):
    """A tower keeps its precision unless `formats` names it."""
    model = make_model(FAMILIES[family])
    arguments = pictures_of(family, 3)
    expected = features(model, arguments)
    kept = optimized(model, precision=precision)
    assert_close(features(kept, arguments), expected, TOLERANCE if precision != "bf16" else tolerance)
    path = next(iter(kept.report().towers))
    named = optimized(model, formats={f"{path}.*": precision})
    assert precision in {row.format for row in named.report().rest.formats}
    made = features(named, arguments)
    assert_close(made, expected, tolerance)
    assert not torch.equal(made[0], expected[0])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_pieces_do_not_change_results(family):
    ours = optimized(make_model(FAMILIES[family]))
    arguments = pictures_of(family, 5)
    whole = features(ours, arguments)
    pieces = []
    for seconds in (0.0, 1e-4, math.inf):
        counter = itertools.count()
        with ours.dso.pace.between(lambda counter=counter, seconds=seconds: (next(counter), seconds)[1]):
            for one, other in zip(features(ours, arguments), whole, strict=True):
                assert torch.equal(one, other)
        pieces.append(next(counter))
    assert pieces[0] > pieces[2]


def test_calls_that_plans_do_not_serve():
    model = make_model(FAMILIES["qwen2_5_vl"])
    ours, arguments = optimized(model), pictures_of("qwen2_5_vl", 2)
    tower = ours.model.visual
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="output_hidden_states"):
        output = tower(arguments["pixel_values"], arguments["image_grid_thw"], output_hidden_states=True)
    assert len(output.hidden_states) == len(tower.blocks) + 1
    tower.train()
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="training mode"):
        tower(arguments["pixel_values"], arguments["image_grid_thw"])


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_gradients_of_pictures(family):
    """Parameters are frozen, but the pixels (or what embeds the patches) may need a gradient."""
    model = make_model(FAMILIES[family]).requires_grad_(False)
    ours, grads = optimized(model), []
    for one in (ours, model):
        arguments = pictures_of(family, 2)
        pixels = arguments["pixel_values"].requires_grad_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OptimizerWarning)
            output = one.model.get_image_features(**arguments, return_dict=True).pooler_output
        assert any("gradients are needed" in str(warning.message) for warning in caught) is (one is ours)
        parts = (output,) if torch.is_tensor(output) else output
        sum(part.square().sum() for part in parts).backward()
        grads.append(pixels.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * grads[1].abs().max().item())


def test_padded_pictures():
    """SmolVLM pads pictures of other shapes: Transformers' own forward masks them."""
    model = make_model(FAMILIES["smolvlm"])
    ours = optimized(model)
    pixels = torch.randn(1, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    mask[..., 16:] = False
    with torch.no_grad():
        expected = model.model.get_image_features(pixel_values=pixels, pixel_attention_mask=mask).pooler_output
        with pytest.warns(OptimizerWarning, match="padded"):
            made = ours.model.get_image_features(pixel_values=pixels, pixel_attention_mask=mask).pooler_output
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_copies():
    model = optimized(make_model(FAMILIES["qwen3_vl"]))
    arguments = pictures_of("qwen3_vl", 2)
    expected = features(model, arguments)
    twin = copy.deepcopy(model)
    assert twin.dso.towers.keys() == model.dso.towers.keys()
    assert all(twin.dso.towers[path] is not model.dso.towers[path] for path in model.dso.towers)
    del model
    assert all(torch.equal(one, other) for one, other in zip(features(twin, arguments), expected, strict=True))
