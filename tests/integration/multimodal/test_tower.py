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
PADDED = "smolvlm, padded"
TOWERS = [
    "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "smolvlm", PADDED, "janus", "deepseek_vl", "deepseek_vl_hybrid", "gemma4",
    "gemma4_small", "deepseek_ocr2",
]  # fmt: skip
TWO_TOWERS = ("deepseek_vl_hybrid", "deepseek_ocr2")


def model_of(family):
    return make_model(FAMILIES[family.split(",")[0]])


def optimized(model, **settings):
    config = DeepSeekConfig(**{"precision": "fp32", "prefill_chunk": 512, **settings})
    return DynamicGraphOptimizer(copy.deepcopy(model), config=config).optimize()


def pictures_of(family, count, seed=0):
    """The arguments of `get_image_features` for pictures of odd shapes; Qwen's have random ones."""
    if family == PADDED:
        return padded_pictures(count, seed)
    text = {"input_ids", "attention_mask", FAMILIES[family].types}
    arguments = {n: v for n, v in make_prompts(FAMILIES[family], [count], seed).arguments.items() if n not in text}
    if "image_grid_thw" not in arguments:
        return arguments
    generator = torch.Generator().manual_seed(seed)
    grid = torch.ones(count, 3, dtype=torch.long)
    grid[:, 1:] = 2 * torch.randint(1, 8, (count, 2), generator=generator)
    pixels = torch.randn(int(grid.prod(-1).sum()), arguments["pixel_values"].shape[1], generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid}


def padded_pictures(count, seed):
    """SmolVLM pads pictures of other shapes on the right and below."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, count, 3, 24, 24, generator=generator)
    mask = torch.zeros(1, count, 24, 24, dtype=torch.bool)
    for i in range(count):
        height, width = 4 * torch.randint(1, 7, (2,), generator=generator)
        mask[0, i, :height, :width] = True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


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
    model = model_of(family)
    ours = optimized(model, backend=backend)
    towers = ours.report().towers
    assert set(towers.values()) == {"plan"} and len(towers) == (2 if family in TWO_TOWERS else 1)
    for count in range(1, 6):
        arguments = pictures_of(family, count, seed=count)
        assert_close(features(ours, arguments), features(model, arguments))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "deepseek_ocr2"])
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


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_vl", "gemma3", PADDED, "gemma4", "deepseek_ocr2", "deepseek_vl_hybrid"]
)
def test_pieces_do_not_change_results(family):
    ours = optimized(model_of(family))
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


def test_masks_that_are_not_of_padding():
    model = model_of(PADDED)
    ours = optimized(model)
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    triangle = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    hidden = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    hidden[1] = False
    with torch.no_grad():
        for mask, reason in ((triangle, "not one of padding"), (hidden, "nothing but padding")):
            expected = model.model.vision_model.encoder(x, mask).last_hidden_state
            with pytest.warns(OptimizerWarning, match=reason):
                made = ours.model.vision_model.encoder(x, mask).last_hidden_state
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=0, equal_nan=True)


def test_padding_with_eager_attention():
    """The mask is then what is added to scores."""
    model = model_of(PADDED)
    arguments = pictures_of(PADDED, 3)
    expected = features(model, arguments)
    model.set_attn_implementation("eager")
    assert_close(features(optimized(model), arguments), expected)


def test_half_precision_keeps_its_keys_and_values():
    """They would lose three bits in bf16. Between the rows that go in and those that come out, everything is fp32."""
    model = make_model(FAMILIES["gemma3"]).half()
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)).half()
    made, expected = (
        one.model.vision_tower.encoder(inputs_embeds=x.to(one.dtype)).last_hidden_state
        for one in (optimized(model, precision="auto"), optimized(model.float()))
    )
    assert made.dtype is torch.float16 and torch.equal(made, expected.half())


def _sam(model):
    return model.model.vision_tower.sam_encoder


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(16, 16), (12, 12), (5, 7), (4, 1)])
def test_pictures_of_other_sizes_than_the_trained_one(size, backend):
    """SAM's tables of relative positions are resized, and windows filled up with padding, in one or both directions."""
    model = model_of("deepseek_ocr2")
    for parameter in _sam(model).parameters():  # tables and positions are zeros in a new model
        torch.nn.init.normal_(parameter, std=0.3)
    ours = optimized(model, backend=backend)
    pixels = torch.randn(3, 3, *(64 * side for side in size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", OptimizerWarning)
        made, expected = (_sam(one)(pixels).last_hidden_state for one in (ours, model))
    torch.testing.assert_close(made, expected, atol=TOLERANCE * expected.abs().max().item(), rtol=0)


def test_plans_of_few_sizes_are_kept():
    ours = optimized(model_of("deepseek_ocr2"))
    plans = ours.dso.towers["model.vision_tower.sam_encoder"]
    pixels = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = [_sam(ours)(pixels[..., : 64 * side]).last_hidden_state for side in (8, 1, 2, 3, 4)]
        assert len(plans._compiled) == 4 and (8, 8) not in plans._compiled
        assert torch.equal(_sam(ours)(pixels).last_hidden_state, first[0])


def test_grids_that_are_too_large():
    model = model_of("deepseek_ocr2")
    ours = optimized(model)
    pixels = torch.randn(1, 3, 64 * 250, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pytest.warns(OptimizerWarning, match="a grid of 250 x 1 patches is not supported"):
        made = _sam(ours)(pixels).last_hidden_state
    with torch.no_grad():
        torch.testing.assert_close(made, _sam(model)(pixels).last_hidden_state, atol=1e-4, rtol=1e-4)


def _other_parameter(block, generator):
    block.norm1.weight = torch.nn.Parameter(torch.rand(32, generator=generator))


def _other_storage(block, generator):
    block.norm2.bias.data = torch.rand(32, generator=generator)


def _written(block, generator):
    with torch.no_grad():
        block.norm2.weight.mul_(1.5)


def _other_module(block, generator):
    norm = torch.nn.LayerNorm(32, eps=1e-6)
    norm.weight.data.uniform_(generator=generator)
    block.norm1 = norm


@pytest.mark.parametrize("change", [_other_parameter, _other_storage, _written, _other_module])
def test_changed_parameters(change):
    """A plan that holds a copy or another storage is compiled again."""
    model = make_model(FAMILIES["qwen3_vl"])
    ours, arguments = optimized(model), pictures_of("qwen3_vl", 2)
    before = features(ours, arguments)
    for one in (ours, model):
        change(one.model.visual.blocks[1], torch.Generator().manual_seed(1))
    after = features(ours, arguments)
    assert not torch.equal(before[0], after[0])
    assert_close(after, features(model, arguments))


def test_replaced_tiles():
    ours, arguments = optimized(make_model(FAMILIES["qwen3_vl"])), pictures_of("qwen3_vl", 2)
    before = features(ours, arguments)
    parameters = ours.model.visual.blocks[1].mlp.linear_fc1._parameters
    tiles = parameters["weight"]
    parameters["weight"] = torch.nn.Parameter(torch.zeros_like(tiles), requires_grad=False)
    assert not torch.equal(before[0], features(ours, arguments)[0])
    parameters["weight"] = tiles
    assert all(torch.equal(one, other) for one, other in zip(features(ours, arguments), before, strict=True))


def test_copies():
    model = optimized(make_model(FAMILIES["qwen3_vl"]))
    arguments = pictures_of("qwen3_vl", 2)
    expected = features(model, arguments)
    twin = copy.deepcopy(model)
    assert twin.dso.towers.keys() == model.dso.towers.keys()
    assert all(twin.dso.towers[path] is not model.dso.towers[path] for path in model.dso.towers)
    del model
    assert all(torch.equal(one, other) for one, other in zip(features(twin, arguments), expected, strict=True))
