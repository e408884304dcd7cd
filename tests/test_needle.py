"""Needles in long texts, retrieved by a model whose weights are set by hand: a failure is a fault of attention."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.integration.compat import cache_name
from support.induction import BOS, haystack, induction_model

native = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
LENGTHS = [8192, pytest.param(32_768, marks=pytest.mark.slow), pytest.param(131_072, marks=pytest.mark.slow)]
SHAPES = [
    {"heads": 1, "vocab": 45},
    {"heads": 2, "kv_heads": 1, "vocab": 45},
    {"heads": 2, "kv_heads": 2, "vocab": 90},
    {"heads": 8, "kv_heads": 2, "head_dim": 128, "vocab": 180},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model: two heads that share their keys, 45 tokens, bf16."""
    folder = tmp_path_factory.mktemp("induction") / "model"
    induction_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """load(mode, **fields): the optimized model, cached by mode and fields."""
    loaded = {}

    def load(mode, **fields):
        key = (mode, *sorted(fields.items()))
        if key not in loaded:
            given = {"backend": "cpu", "kv_cache": "bf16", "attention_optimization": mode, **fields}
            loaded[key] = load_model(folder, **given)
        return loaded[key]

    return load


def _needles(length, count, seed, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    depths = low + (high - low) * torch.rand(count, generator=generator)
    return haystack(45, length, depths.tolist(), seed)


@torch.inference_mode()
def _read(model, hay):
    """The model's answers, with text and questions in one call."""
    ids = torch.tensor([hay.ids])
    return model(ids, logits_to_keep=len(hay.keys)).logits[0].argmax(-1).tolist()


@torch.inference_mode()
def _decoded(model, hay):
    """The same, with each question as a separate step after the cached text."""
    cache = model(torch.tensor([hay.ids[: hay.length]]), use_cache=True, logits_to_keep=1)[cache_name()]
    answers = []
    for key in hay.keys:
        output = model(torch.tensor([[key]]), use_cache=True, **{cache_name(): cache})
        answers.append(int(output.logits[0, -1].argmax()))
    return answers


def _right(result, hay):
    return sum(a == b for a, b in zip(result, hay.values, strict=True))


def test_haystacks_are_well_formed():
    for seed in range(50):
        hay = _needles(400, 20, seed)
        assert len(hay.ids) == 400 and hay.ids[0] == BOS and BOS not in hay.ids[1:]
        assert hay.length == 380 and hay.ids[hay.length :] == hay.keys
        for key, value, place in zip(hay.keys, hay.values, hay.places, strict=True):
            assert hay.ids[: hay.length].count(key) == 1 and hay.ids[place : place + 2] == [key, value]
            assert value not in hay.keys and place + 1 < hay.length
    edges = haystack(45, 60, [0.0, 0.0, 1.0, 1.0])
    assert edges.places == [1, 3, 52, 54]
    for length, count in ((9, 4), (400, 44)):
        with pytest.raises(ValueError, match="needles"):
            haystack(45, length, [0.5] * count)
    with pytest.raises(ValueError, match="tell 45 tokens apart, not 46"):
        induction_model(46)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_transformers_finds_every_needle(shape):
    model = induction_model(**shape).float()
    for seed in range(3):
        depths = torch.rand(12, generator=torch.Generator().manual_seed(seed)).tolist()
        hay = haystack(shape["vocab"], (130, 1000, 2100)[seed], depths, seed)
        assert _right(_read(model, hay), hay) == 12
    ids = [token for token in hay.ids[: hay.length] if token not in hay.keys] + hay.keys
    assert model(torch.tensor([ids]), logits_to_keep=12).logits[0].argmax(-1).tolist() == [BOS] * 12  # no needle


@native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_in_bf16(shape, tmp_path):
    induction_model(**shape).save_pretrained(tmp_path)
    model = load_model(tmp_path, backend="cpu", kv_cache="bf16")
    for seed in range(3):
        depths = torch.rand(12, generator=torch.Generator().manual_seed(seed)).tolist()
        hay = haystack(shape["vocab"], (130, 1000, 2100)[seed], depths, seed)
        assert _right(_read(model, hay), hay) == _right(_decoded(model, hay), hay) == 12


@native
@pytest.mark.parametrize("length", LENGTHS)
def test_exact_attention_finds_all(load, length):
    hay = _needles(length, 20, seed=1)
    assert _right(_decoded(load("flash"), hay), hay) == 20
    assert _right(_read(load("flash"), hay), hay) == 20


@native
@pytest.mark.parametrize("length", LENGTHS)
def test_sparse_attention_finds_98_of_100(load, length):
    model, right = load("sparse"), 0
    hays = [_needles(length, 20, seed) for seed in range(5)]
    for hay in hays[:3]:
        right += _right(_read(model, hay), hay)
    for hay in hays[3:]:
        right += _right(_decoded(model, hay), hay)
    assert right >= 98, f"{right} of 100"


@native
def test_each_question_selects_its_own_blocks(load):
    """Six blocks per question: two or three of the window, one of sinks; twenty needles are in many more."""
    model = load("sparse", attention_window=64, attention_budget=192)
    hay = _needles(8192, 20, seed=2, high=0.9)
    assert len({place // 32 for place in hay.places}) > 12
    assert _right(_read(model, hay), hay) == _right(_decoded(model, hay), hay) == 20


@native
@pytest.mark.parametrize("length", LENGTHS)
def test_sliding_attention_finds_needles_in_the_window(load, length):
    window = 2048
    model, last = load("sliding", attention_window=window), length - 20
    inside = _needles(length, 20, seed=3, low=(length - window + 40) / length)
    assert min(inside.places) >= length - window
    assert _right(_read(model, inside), inside) == _right(_decoded(model, inside), inside) == 20
    outside = _needles(length, 20, seed=4, low=8 / length, high=(last - window - 40) / length)
    assert 4 < min(outside.places) and max(outside.places) + 1 < last - window
    assert _read(model, outside) == _decoded(model, outside) == [BOS] * 20


@native
@pytest.mark.parametrize("distance, actual", [(255, True), (256, False), (257, False)])
def test_the_window_has_its_stated_length(load, distance, actual):
    """Visible are the token itself and the 255 before it."""
    model = load("sliding", attention_window=256)
    length = 1200
    hay = haystack(45, length, [(length - 1 - distance - 1 - 1) / (length - 4)])
    assert length - 1 - (hay.places[0] + 1) == distance  # from the question to the value
    expected = hay.values if actual else [BOS]
    assert _read(model, hay) == _decoded(model, hay) == expected


@pytest.mark.parametrize("mode, actual", [("flash", 3), ("sliding", 1), ("sparse", 3)])
def test_the_reference_backend_does_the_same(load, mode, actual):
    fields = {} if mode == "flash" else {"attention_window": 64}
    model = load(mode, backend="reference", **fields, **({"attention_budget": 192} if mode == "sparse" else {}))
    hay = haystack(45, 600, [0.1, 0.5, 0.95])
    assert _right(_read(model, hay), hay) == _right(_decoded(model, hay), hay) == actual
