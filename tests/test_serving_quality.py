"""Engines for models whose weights have several qualities: each request is computed as if it were alone, at its own."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer import ConfigError, Request, RequestError, SamplingParams, load_model, make_engine
from deepseek_optimizer.backends.base import CompileOptions
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.backends.nested_weights import at_quality, feed_forward_weights
from deepseek_optimizer.backends.qualities import EXACT, QUALITIES
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.integration.bind.swap import matrices_of, weights_of
from deepseek_optimizer.quant.packed import PackedMatrix, PackedStack
from support.family_configs import llama
from support.lora import save_adapter
from support.models import CASES, random_ids, random_model
from support.steps import runner

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")


@pytest.fixture(scope="module")
def base():
    return random_model(llama())


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "model"
    base.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, precision="int8_nested")


def requests_of(config, count=9, length=24, **fields):
    shared = random_ids(config, 70, seed=9)
    return [
        Request(
            shared + random_ids(config, 1 + 7 * n, seed=n),
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=2),
            id=str(n),
            quality=(*QUALITIES, None)[n % 4],
            **fields,
        )
        for n in range(count)
    ]


def results(completions):
    assert all(c.error is None for c in completions)
    return [(c.token_ids, c.logprobs, c.quality) for c in completions]


@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-tied", "gemma2-limits", "deepseek_v3-groups"])
def test_what_each_quality_reads(case, tmp_path):
    """Against the reference backend, which dequantizes them, for dense models, tied embeddings and experts with latents."""
    random_model(CASES[case]()).save_pretrained(tmp_path)
    model = load_model(tmp_path, precision="int8_nested")
    graph, weights = model.dso.graph, weights_of(model, model.dso.graph)
    ids = random_ids(model.config, 40)
    seen = {}
    for quality in QUALITIES:
        own, read = at_quality(quality, graph, weights)
        shared = {w.data.data_ptr() for w in read.values() if isinstance(w, PackedMatrix | PackedStack)}
        assert shared == {w.data.data_ptr() for w in matrices_of(model, graph).values()}, "nothing is copied"
        expected = runner(ReferenceBackend(), own, read).logits(ids)
        made = seen[quality] = runner(model.dso.backend, own, read, options=CompileOptions("int16")).logits(ids)
        errors = (made - expected).abs().amax(-1) / expected.abs().amax(-1)
        tolerance = 1e-2 if "deepseek" in case else 2e-3  # kv_b is multiplied in bf16; some rows choose other experts
        assert (errors.median() if "deepseek" in case else errors.max()) < tolerance
    exact = [(seen[EXACT] - seen[quality]).norm() for quality in QUALITIES]
    assert exact[0] > exact[1] > exact[2] == 0
    assert any("down_proj" in name for name in feed_forward_weights(graph))
    assert not any("attn" in name or "head" in name or "embed" in name for name in feed_forward_weights(graph))
    assert feed_forward_weights(model.dso.adapter_graph(8)) == feed_forward_weights(graph)


@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups"])
def test_mixed_requests_are_computed_as_if_alone(case, tmp_path):
    """Tokens and log probabilities are equal, bit for bit, also from the prefix cache, which qualities do not share."""
    random_model(CASES[case]()).save_pretrained(tmp_path)
    model = load_model(tmp_path, precision="int8_nested", batch_invariant=True)
    requests = requests_of(model.config)
    engine = make_engine(model, batch_size_range=(1, 16), step_tokens=64)
    together = engine.generate(requests)
    again = engine.generate(requests)
    assert results(again) == results(together) and min(c.cached_tokens for c in again) >= 64
    for request, completion in zip(requests, together, strict=True):
        alone = make_engine(model, drafts=False, prefix_cache=False)
        assert results(alone.generate([request])) == results([completion])
        assert completion.quality == (request.quality or EXACT)
    assert len({tuple(c.token_ids) for c in together[:4]}) > 1
    assert engine.core.metrics.qualities == {"fast": 6, "balanced": 4, "exact": 8}


def test_a_prefix_of_another_quality_is_not_used(model):
    engine = make_engine(model)
    prompt = random_ids(model.config, 100, seed=1)
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    cached = [
        engine.generate([Request(prompt, sampling, id="a", quality=quality)])[0].cached_tokens
        for quality in ("fast", "exact", None, "balanced", "fast", "balanced")
    ]
    assert [tokens > 0 for tokens in cached] == [False, False, True, True, True, True], "balanced prompts are exact"


def test_text_of_lower_quality_does_not_become_an_exact_prompt(model):
    prompt = random_ids(model.config, 100, seed=3)
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for quality, cached in (("exact", 128), ("balanced", 96), ("fast", 0)):
        engine = make_engine(model)
        (first,) = engine.generate([Request(prompt, sampling, quality=quality)])
        (then,) = engine.generate([Request(prompt + first.token_ids, sampling, quality="exact")])
        assert cached <= then.cached_tokens < cached + 32 and then.error is None
        if cached:
            assert (then.cached_tokens > 96) == (quality == "exact"), "only blocks of the prompt"


def test_preempted_requests_are_recomputed_at_their_qualities(checkpoint):
    model = load_model(checkpoint, precision="int8_nested", batch_invariant=True)
    requests = requests_of(model.config, length=40)
    wanted = results(make_engine(model, drafts=False).generate(requests))
    small = model.dso.new_arena(18 * model.dso.arena.store.block_bytes)
    engine = make_engine(model, arena=small, drafts=False)
    assert results(engine.generate(requests)) == wanted and engine.core.metrics.preemptions > 0


def test_exact_is_what_the_model_computes_by_itself(model):
    prompt = random_ids(model.config, 30, seed=2)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, 30:].tolist()
    for quality in (None, "exact"):
        (completion,) = make_engine(model).generate([Request(prompt, sampling, quality=quality)])
        assert completion.token_ids == whole and completion.quality == "exact"


def test_with_adapters(base, checkpoint, tmp_path):
    adapter = str(save_adapter(base, tmp_path / "a", seed=1, targets=("q_proj", "down_proj"), r=4))
    model = load_model(checkpoint, precision="int8_nested", batch_invariant=True)
    engine = make_engine(model, adapters={"a": adapter})
    plain, adapted = requests_of(base.config, 4), requests_of(base.config, 4, adapter="a")
    adapted = [Request(r.prompt, r.sampling, id=f"a{r.id}", quality=r.quality, adapter="a") for r in adapted]
    together = engine.generate(plain + adapted)
    for request, completion in zip(plain + adapted, together, strict=True):
        assert results(make_engine(model, adapters={"a": adapter}).generate([request])) == results([completion])
    assert len({tuple(c.token_ids) for c in together}) > 4


def test_saved_and_loaded_models_are_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "packed")
    loaded = load_model(tmp_path / "packed")
    assert {m.format for m in matrices_of(loaded, loaded.dso.graph).values()} == {"int8_nested"}
    requests = requests_of(model.config, 4)
    assert results(make_engine(loaded).generate(requests)) == results(make_engine(model).generate(requests))


def test_the_report_says_what_each_quality_reads(model):
    sizes, whole = model.report().qualities, matrices_of(model, model.dso.graph)
    read = {name: w.nbytes for name, w in whole.items() if "embed" not in name}
    assert sizes["exact"] == sum(read.values()) and sizes["fast"] * 17 == sizes["exact"] * 9
    feed_forward = sum(size for name, size in read.items() if "mlp" in name)
    assert sizes["balanced"] == sizes["exact"] - feed_forward * 8 // 17
    assert "by quality of a request: fast" in str(model.report())


def test_other_models_refuse_the_field(checkpoint):
    engine = make_engine(load_model(checkpoint, precision="int4"))
    with pytest.raises(RequestError, match='quality: .*one quality; load it with precision="int8_nested"'):
        engine.generate([Request([1, 2], quality="fast")])
    assert engine.generate([[1, 2]], SamplingParams(max_tokens=2))[0].quality is None
    assert not engine.core.facts.qualities


def test_the_engine_chooses_a_quality_for_requests_that_name_none(model, base):
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompt = random_ids(base.config, 20, seed=3)
    given = [{}, {"quality": "exact"}, {"min_quality": "balanced"}, {"min_quality": "fast"}]
    requests = [Request(prompt, sampling, id=str(n), **fields) for n, fields in enumerate(given)]
    assert [c.quality for c in make_engine(model, quality="fast").generate(requests)] == ["fast", "exact", "balanced", "fast"]
    assert [c.quality for c in make_engine(model).generate(requests)] == ["exact"] * 4
    same = make_engine(model).generate([Request(prompt, sampling, quality="fast")])[0]
    assert make_engine(model, quality="fast").generate(requests[:1])[0].token_ids == same.token_ids


def test_a_quality_that_is_not_there(model, checkpoint):
    with pytest.raises(ConfigError, match="quality must be one of fast, balanced, exact, got 'best'"):
        make_engine(model, quality="best")
    with pytest.raises(ConfigError, match="this model has one quality"):
        make_engine(load_model(checkpoint), quality="fast")
