"""`attn_implementation="dso_sliding"` in plain Transformers models, against Transformers' eager attention with dense masks."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from deepseek_optimizer import ConfigError, DeepSeekConfig, DynamicGraphOptimizer, UnsupportedRequestError
from deepseek_optimizer.integration.attention import sliding_attention as module
from support.models import CASES, assert_close_rows, random_model

FAMILIES = [
    "llama-gqa", "llama-mqa", "llama-wide-heads", "qwen2-gqa", "qwen2-windows", "qwen3-layer-types", "deepseek_v2-greedy",
    "deepseek_v3-groups", "deepseek_v3-direct", "youtu-tied",
]  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_SCORE_BYTES", 0)  # 16 queries each


def dense(real, window, sinks, own=None):
    """float32 [B, 1, T, T] to be added to scores; `real` bool [B, T]."""
    tokens = real.shape[1]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    first = real.int().argmax(-1)[:, None, None]
    seen = (j <= i) & ((i - j < window) | (j - first < sinks)) & real[:, None]
    if own is not None:
        seen = seen & (i - j < own)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


@torch.no_grad()
def expected_logits(eager, ids, real, window, sinks):
    """Transformers' logits, without a cache."""
    mask = dense(real, window, sinks)
    own = getattr(eager.config, "sliding_window", None)
    if "sliding_attention" in (getattr(eager.config, "layer_types", None) or ()):
        mask = {"full_attention": mask, "sliding_attention": dense(real, window, sinks, own)}
    places = (real.long().cumsum(-1) - 1).clamp(min=0)
    return eager(ids, attention_mask=mask, position_ids=places, use_cache=False).logits


def pair(name, window, sinks, **fields):
    eager = random_model(CASES[name]() if isinstance(name, str) else name)
    sliding = copy.deepcopy(eager)
    sliding.set_attn_implementation("dso_sliding")
    sliding.config.dso_window, sliding.config.dso_sinks = window, sinks
    return eager, sliding


def padded(config, *lengths, seed=0):
    """Ids [B, T], padded on the left, and a mask of the real ones."""
    longest = max(lengths)
    ids = torch.randint(3, config.vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    real = torch.stack([torch.arange(longest) >= longest - n for n in lengths])
    return ids * real, real


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (1, 0), (41, 4), (3, 60), (1000, 4)])
@torch.no_grad()
def test_families_and_padding(name, window, sinks, small_pieces):
    eager, sliding = pair(name, window, sinks)
    for lengths in ((70,), (67, 23, 1)):
        ids, real = padded(eager.config, *lengths)
        places = (real.long().cumsum(-1) - 1).clamp(min=0)
        actual = sliding(ids, attention_mask=real.long(), position_ids=places).logits
        assert_close_rows(actual[real], expected_logits(eager, ids, real, window, sinks)[real])


@torch.no_grad()
def test_chunks_change_nothing(monkeypatch):
    _, sliding = pair("llama-gqa", 37, 3)
    ids, _ = padded(sliding.config, 700)
    whole = sliding(ids).logits[0]
    monkeypatch.setattr(module, "_SCORE_BYTES", 0)
    assert_close_rows(sliding(ids).logits[0], whole, 1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-windows", "deepseek_v3-groups"])
@torch.no_grad()
def test_generate_with_a_cache(name, small_pieces):
    eager, sliding = pair(name, 9, 2)
    ids, real = padded(eager.config, 50, 31)
    made = sliding.generate(ids, attention_mask=real.long(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    for _ in range(12):
        logits = expected_logits(eager, ids, real, 9, 2)[:, -1]
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        real = torch.cat((real, torch.ones(2, 1, dtype=torch.bool)), 1)
    assert torch.equal(made, ids)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the argument has this name in every supported release
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_prompt_in_chunks(kind, small_pieces):
    eager, sliding = pair("llama-gqa", 9, 2)
    ids, real = padded(eager.config, 80)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=sliding.config, max_cache_len=100)
    actual = []
    for start, end in ((0, 33), (33, 34), (34, 75), (75, 80)):
        places = torch.arange(start, end)[None]
        actual.append(sliding(ids[:, start:end], past_key_values=cache, position_ids=places, use_cache=True).logits[0])
    assert_close_rows(torch.cat(actual), expected_logits(eager, ids, real, 9, 2)[0])


@torch.no_grad()
def test_beams_and_assisted_generation():
    _, sliding = pair("llama-gqa", 9, 2)
    ids, _ = padded(sliding.config, 40)
    plain = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    alone = sliding.generate(ids, **plain)
    assert torch.equal(sliding.generate(ids, prompt_lookup_num_tokens=3, **plain), alone)
    assert sliding.generate(ids, num_beams=3, **plain).shape == (1, 50)


@torch.no_grad()
def test_the_indexer_is_not_used():
    config = CASES["deepseek_v32-types"]()  # its indexer keeps 40
    eager, sliding = pair(config, 9, 2)
    ids, real = padded(eager.config, 40)
    assert_close_rows(sliding(ids).logits[0], expected_logits(eager, ids, real, 9, 2)[0])


@torch.no_grad()
def test_texts_packed_into_one_row():
    eager, sliding = pair("llama-gqa", 5, 2)
    ids, real = padded(eager.config, 50)
    places = torch.cat((torch.arange(27), torch.arange(23)))[None]
    actual = sliding(ids, position_ids=places, use_cache=False).logits[0]
    for start, end in ((0, 27), (27, 50)):
        own = expected_logits(eager, ids[:, start:end], real[:, start:end], 5, 2)[0]
        assert_close_rows(actual[start:end], own)


@torch.no_grad()
def test_a_callers_mask_is_used_unchanged():
    eager, sliding = pair("llama-gqa", 3, 1)
    ids, real = padded(eager.config, 40)
    mask = dense(real, 11, 0)
    for given in (mask, mask == 0):
        assert_close_rows(sliding(ids, attention_mask=given).logits[0], expected_logits(eager, ids, real, 11, 0)[0])


def test_gradients(small_pieces):
    eager, sliding = pair("llama-gqa", 9, 2)
    ids, real = padded(eager.config, 50)
    sliding(ids).logits.sum().backward()
    eager(ids, attention_mask=dense(real, 9, 2)).logits.sum().backward()
    for actual, expected in zip(sliding.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-3 * float(expected.grad.abs().max()))


@pytest.mark.parametrize("seed", range(30))
def test_masks_by_chunks_against_dense_masks(seed):
    """With caches that have dropped their first keys, and that have more room than keys."""
    draw = random.Random(seed)
    window, sinks, own = draw.choice((1, 3, 9, 50)), draw.choice((0, 1, 4, 30)), draw.choice((None, 6, 20))
    queries, before = draw.choice((1, 2, 17, 40)), draw.choice((0, 1, 30))
    dropped = draw.choice((0, min(before, 11)))
    beyond = draw.choice((0, 5))
    keys, total = before + queries - dropped + beyond, before + queries + beyond
    padding = None
    if draw.random() < 0.6:
        begins = [draw.randrange(before + queries) for _ in range(3)]
        padding = torch.stack([torch.arange(before + queries) >= b for b in begins])
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    rule = causal_mask_function if own is None else sliding_window_causal_mask_function(own)

    class Config:
        dso_window, dso_sinks = window, sinks

    given = {"q_offset": before, "kv_offset": dropped, "mask_function": rule, "local_size": own, "config": Config}
    mask = module.sliding_mask(3, queries, keys, attention_mask=padding, **given)
    full = module.sliding_mask(3, queries, keys, attention_mask=padding, allow_is_causal_skip=False, **given)
    real = torch.ones(3, total, dtype=torch.bool)
    if padding is not None:
        real[:, : before + queries] = padding
        real[:, before + queries :] = False
    expected = dense(real, window, sinks, own)[:, :, before : before + queries, dropped:] == 0
    assert torch.equal(full.expand_as(expected), expected)
    actual = torch.zeros_like(expected)
    step = draw.choice((1, 7, queries))
    for start in range(0, queries, step):
        end = min(start + step, queries)
        keys = mask.key_range(start, end)
        seen = keys.visible.expand(3, -1, -1, -1)[:, 0]
        apart = 0 if keys.sinks is None else keys.sinks.shape[1]
        assert seen.shape[2] == apart + keys.high - keys.low
        actual[:, 0, start:end, keys.low : keys.high] = seen[:, :, apart:]
        for row in range(3):
            for s in range(apart):
                column = int(keys.sinks.expand(3, -1)[row, s])
                assert not (actual[row, 0, start:end, column] & seen[row, :, s]).any()  # no key counts twice
                actual[row, 0, start:end, column] |= seen[row, :, s]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("own", [None, 4])
@torch.no_grad()
def test_without_a_mask(own):
    """As when a caller runs an attention module alone."""
    _, sliding = pair("llama-one-layer", 7, 2)
    attention, draw = sliding.model.layers[0].self_attn, torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, t, 12, generator=draw) for h, t in ((6, 9), (2, 30), (2, 30)))
    actual, weights = module.sliding_attention(attention, query, key, value, None, sliding_window=own)
    mask = dense(torch.ones(2, 30, dtype=torch.bool), 7, 2, own)[:, :, 21:]
    assert weights is None and actual.shape == (2, 9, 6, 12)
    expected = ((query @ key.repeat_interleave(3, 1).mT) * 12**-0.5 + mask).softmax(-1) @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@torch.no_grad()
def test_bidirectional_attention_is_unchanged():
    eager, sliding = pair("llama-gqa", 3, 1)
    for model in (eager, sliding):
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    ids, _ = padded(eager.config, 30)
    assert_close_rows(sliding(ids, use_cache=False).logits[0], eager(ids, use_cache=False).logits[0])


@torch.no_grad()
def test_no_dense_mask_is_built():
    _, sliding = pair("llama-gqa", 64, 4)
    tokens = 3000
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(made) if hasattr(t, "numel"))])
            return made

    with Largest():
        sliding(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=1)
    assert tokens * 100 < largest < tokens**2 / 4


def test_the_name_is_registered_by_the_import(tiny_model):
    script = (
        "import deepseek_optimizer\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}, attn_implementation='dso_sliding')\n"
        "import torch\n"
        "model.config.dso_window, model.config.dso_sinks = 2, 0\n"
        "ids = torch.tensor([[5, 6, 7, 8, 9, 10]])\n"
        "far = model(ids).logits[0, -1]\n"
        "model.config.dso_window = 6\n"
        "assert not torch.allclose(model(ids).logits[0, -1], far)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@torch.no_grad()
def test_default_windows_cover_short_texts(tiny_model):
    sliding = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="dso_sliding")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    ids = torch.arange(3, 203)[None]
    assert_close_rows(sliding(ids).logits[0], plain(ids).logits[0])


@pytest.mark.parametrize(("field", "value"), [("dso_window", 0), ("dso_window", "many"), ("dso_sinks", -1)])
def test_invalid_windows(field, value):
    _, sliding = pair("llama-one-layer", 8, 1)
    setattr(sliding.config, field, value)
    with pytest.raises(ConfigError, match=field):
        sliding(torch.tensor([[1, 2, 3]]))


@pytest.mark.filterwarnings("ignore::deepseek_optimizer.integration.bind.runtime.OptimizerWarning")
def test_an_optimized_model_rejects_the_name(tiny_model):
    requested = {"attn_implementation": "dso_sliding"}
    with pytest.raises(ConfigError, match='attention_optimization="sliding"'):
        AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=DeepSeekConfig(backend="reference"), **requested)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, **requested)
    with pytest.raises(ConfigError, match='attention_optimization="sliding"'):
        DynamicGraphOptimizer(plain, config=DeepSeekConfig(backend="reference")).optimize()


def test_other_softmaxes_are_rejected():
    _, sliding = pair("llama-one-layer", 8, 1)
    attention = sliding.model.layers[0].self_attn
    states = torch.zeros(1, 6, 3, 12), torch.zeros(1, 2, 3, 12), torch.zeros(1, 2, 3, 12)
    with pytest.raises(UnsupportedRequestError, match="softcap"):
        module.sliding_attention(attention, *states, None, softcap=30.0)
