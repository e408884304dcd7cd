"""Attention modes through load_model, generate and engines: visible tokens, cached tokens, and messages about them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseek_optimizer import (
    ConfigError,
    DeepSeekConfig,
    DynamicGraphOptimizer,
    PagedCache,
    Request,
    SamplingParams,
    load_model,
    make_engine,
)
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.cache import HOLE, Forgetting
from deepseek_optimizer.errors import DroppedTokensError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from support.family_configs import deepseek_v3, llama
from support.models import CASES, assert_close_rows, random_ids, random_model
from support.mtp_files import save_with_mtp
from support.row_by_row import logits_in_mode

from .conftest import BACKENDS, Pair, make_pair

SLIDING = {"attention_optimization": "sliding", "attention_window": 37, "attention_sinks": 3}
SPARSE = {"attention_optimization": "sparse", "attention_window": 40, "attention_sinks": 1, "attention_budget": 160}
MODES = {"sliding": SLIDING, "sparse": SPARSE}
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


def forget_early(model: Any) -> Any:
    """Removes the spare tokens, so that blocks of short texts are dropped too. Returns the manager of the cache's blocks."""
    manager = model.dso.arena.manager
    if manager.forgetting is not None:
        manager.groups = (replace(manager.forgetting, spare=0),)
    return manager


def greedy(model: Any, ids: Any, count: int, **options: Any) -> Any:
    return model.generate(torch.as_tensor(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)


@pytest.fixture(scope="module")
def pairs():
    made: dict[Any, Pair] = {}

    def pair(case: str, backend: str, mode: str) -> Pair:
        """Shared; do not modify it."""
        key = case, backend, mode
        if key not in made:
            made[key] = make_pair(case, backend, **MODES[mode])
            forget_early(made[key].fast)
        return made[key]

    return pair


@backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-windows", "deepseek_v2-greedy", "deepseek_v3-groups"])
def test_logits_and_text(case: str, mode: str, backend: str, pairs: Any) -> None:
    """Generated tokens agree with the logits of the whole text."""
    pair = pairs(case, backend, mode)
    ids = pair.ids(180)
    text = greedy(pair.fast, ids, 60)
    expected = logits_in_mode(pair.plain, text[0].tolist(), pair.fast.dso.config.attention)
    assert_close_rows(pair.fast(text).logits[0], expected, 3e-4)
    assert text[0, 180:].tolist() == expected[179:-1].argmax(-1).tolist()


@backends
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_batch_are_independent(mode: str, backend: str, pairs: Any) -> None:
    """Padded rows, whose windows begin at different positions; beams, which fork and reorder; several answers."""
    pair = pairs("llama-gqa", backend, mode)
    lengths = (230, 41, 170)
    ids, mask = pair.ids(*lengths), pair.mask(*lengths)
    together = greedy(pair.fast, ids, 50, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = greedy(pair.fast, ids[row : row + 1, -length:], 50)
        assert together[row, max(lengths) :].tolist() == alone[0, length:].tolist()
    beams = {"num_beams": 3, "num_return_sequences": 2}
    exact = greedy(pair.fast, ids[:1], 12, use_cache=False, **beams)
    assert greedy(pair.fast, ids[:1], 12, **beams).tolist() == exact.tolist()
    assert pair.fast.dso.arena.used_bytes == 0


@backends
@pytest.mark.parametrize("mode", MODES)
def test_drafts_change_nothing(mode: str, backend: str, pairs: Any) -> None:
    """By prompt lookup, in our loop and in Transformers', and by an assistant, which rolls back more than a window."""
    pair = pairs("llama-gqa", backend, mode)
    ids = pair.ids(60).repeat(1, 4)
    plain = greedy(pair.fast, ids, 80).tolist()
    assert greedy(pair.fast, ids, 80, prompt_lookup_num_tokens=9).tolist() == plain
    assert greedy(pair.fast, ids, 80, prompt_lookup_num_tokens=9, output_hidden_states=True).tolist() == plain
    other = make_pair("llama-gqa", backend).fast
    other.generation_config.num_assistant_tokens = 70
    other.generation_config.num_assistant_tokens_schedule = "constant"
    assert greedy(pair.fast, ids, 80, assistant_model=other).tolist() == plain


@pytest.mark.parametrize("mode", MODES)
def test_mtp_layers_use_the_same_mode(mode: str, tmp_path: Any) -> None:
    save_with_mtp(tmp_path / "model", deepseek_v3())
    model = load_model(tmp_path / "model", backend="reference", **MODES[mode])
    if mode == "sliding":
        model.dso.arena.manager.groups = (Forgetting(37, 3, spare=288),)  # the lag of MTP layers, and a block
    ids = torch.tensor([random_ids(model.config, 200)])
    plain = greedy(model, ids, 90).tolist()
    assert greedy(model, ids, 90, use_mtp=True, num_assistant_tokens_schedule="constant").tolist() == plain
    assert model.dso.speculation.drafted > 20
    assert model.dso.arena.used_bytes == 0


# ---- a cache that drops blocks


def used(model: Any) -> int:
    arena = model.dso.arena
    return arena.used_bytes // arena.store.block_bytes


@backends
def test_a_prompt_of_100000_tokens_needs_the_memory_of_a_window(backend: str) -> None:
    """After prefill, more tokens are generated."""
    plain = random_model(llama(num_hidden_layers=1, max_position_embeddings=200_000, hidden_size=24, intermediate_size=32))
    fast = DynamicGraphOptimizer(plain, config=DeepSeekConfig(precision="fp32", backend=backend, **SLIDING)).optimize()
    max_blocks = forget_early(fast).forgetting.blocks(fast.dso.config.prefill_chunk)
    ids = torch.tensor([random_ids(fast.config, 100_000)])
    cache, seen = PagedCache(fast), []
    fast(ids, cache=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 100_000 and 2 <= used(fast) <= 4
    assert fast.dso.arena.manager.high_water <= max_blocks

    def watch(_: Any, scores: Any) -> Any:
        seen.append(used(fast))
        return scores

    greedy(fast, torch.nn.functional.pad(ids, (0, 1), value=7), 500, **{cache_name(): cache}, logits_processor=[watch])
    assert len(seen) == 500 and max(seen) <= 5 and cache.get_seq_length() == 100_500
    assert fast.dso.arena.manager.high_water <= max_blocks
    del cache
    assert used(fast) == 0


@pytest.mark.slow
@native
def test_100000_generated_tokens_need_the_memory_of_a_window() -> None:
    plain = random_model(llama(num_hidden_layers=1, max_position_embeddings=200_000, hidden_size=24, intermediate_size=32))
    fast = DynamicGraphOptimizer(plain, config=DeepSeekConfig(precision="fp32", **SLIDING)).optimize()
    seen: list[int] = []

    class Watch:
        def put(self, tokens: torch.Tensor) -> None:
            seen.append(used(fast))

        def end(self) -> None:
            pass

    text = greedy(fast, [[1, 2, 3]], 100_000, streamer=Watch(), eos_token_id=None)
    assert text.shape[1] == 100_003 and max(seen) <= fast.dso.arena.manager.forgetting.blocks(1)


@backends
@pytest.mark.parametrize("case", ["llama-gqa", "deepseek_v3-groups"])
def test_the_same_text_without_dropping_blocks(case: str, backend: str) -> None:
    pair = make_pair(case, backend, prefill_chunk=64, **SLIDING)
    ids, manager = pair.ids(400), forget_early(pair.fast)
    max_blocks = manager.forgetting.blocks(64)
    text = greedy(pair.fast, ids, 150)
    assert manager.high_water == 0 and pair.fast(text).logits.isfinite().all()
    cache = PagedCache(pair.fast)
    last = pair.fast(text, cache=cache).logits[0, -1]
    assert used(pair.fast) <= max_blocks
    manager.groups = (None,)
    assert greedy(pair.fast, ids, 150).tolist() == text.tolist()
    torch.testing.assert_close(pair.fast(text, cache=PagedCache(pair.fast)).logits[0, -1], last)


@backends
def test_cropping(backend: str, pairs: Any) -> None:
    """A few tokens work; more is an error with the reason, which does not change the cache. Dropped tokens read as zeros."""
    pair = pairs("llama-gqa", backend, "sliding")
    ids = pair.ids(300)
    cache = PagedCache(pair.fast)
    whole = pair.fast(ids, cache=cache).logits[0]
    with pytest.raises(DroppedTokensError, match="attention_window"):
        cache.crop(-150)
    assert cache.get_seq_length() == 300
    cache.crop(-5)
    again = pair.fast(ids[:, 295:], cache=cache).logits[0]
    torch.testing.assert_close(again, whole[295:], atol=1e-4, rtol=1e-4)
    sequence = cache.state.sequences[0]
    gone = [t for t in range(300) if sequence.blocks[t // 32] == HOLE]
    keys = cache.layers[1].keys[0]
    assert gone and not keys[:, gone].any() and keys[:, :32].all() and keys[:, gone[-1] + 1 :].all()
    copied = copy.deepcopy(cache)
    a, b = (pair.fast(ids[:, :5], cache=c).logits for c in (cache, copied))
    assert torch.equal(a, b)


def test_a_failed_step_after_others_dropped_blocks() -> None:
    """The cache is empty then, and its blocks are free."""
    pair = make_pair("llama-gqa", prefill_chunk=64, **SLIDING)
    forget_early(pair.fast)
    cache, plan, runs = PagedCache(pair.fast), pair.fast.dso.plan, []
    pair.fast(pair.ids(50), cache=cache)

    def run(batch: Any, store: Any) -> Any:
        runs.append(1)
        if len(runs) > 5:
            raise KeyboardInterrupt
        return type(plan).run(plan, batch, store)

    plan.run = run
    with pytest.raises(KeyboardInterrupt):
        pair.fast(pair.ids(600), cache=cache)
    assert cache.get_seq_length() == 0 and used(pair.fast) == 0
    del plan.run
    pair.fast(pair.ids(50), cache=cache)
    assert cache.get_seq_length() == 50


@backends
def test_an_engine_processes_prompts_longer_than_its_cache(backend: str, tmp_path: Any) -> None:
    model = random_model(llama(max_position_embeddings=20_000))
    model.save_pretrained(tmp_path / "model")
    made = load_model(tmp_path / "model", precision="fp32", backend=backend, prefill_chunk=128, **SLIDING)
    made.dso.config.kv_cache_memory = 24 * made.dso.backend.block_bytes(made.dso.graph, "fp32")
    prompts = [prompt := random_ids(made.config, 3_000), [*prompt, 5, 6]]
    texts = [greedy(made, [ids], 40)[0, len(ids) :].tolist() for ids in prompts]
    assert made.dso.arena.manager.num_blocks == 24 < 3_000 // 32
    engine, sampling = make_engine(made), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    first, second = (engine.generate([Request(ids, sampling)])[0] for ids in prompts)
    assert [list(first.token_ids), list(second.token_ids)] == texts
    assert second.cached_tokens >= 2_976  # found by its end


@native
def test_mtp_layers_after_a_cached_prefix(tmp_path: Any, caplog: Any) -> None:
    """They have no rows before it; their first rows are dropped later, and they continue without them."""
    save_with_mtp(tmp_path / "model", deepseek_v3())
    model = load_model(tmp_path / "model", **SLIDING)
    model.dso.arena.manager.groups = (Forgetting(37, 3, spare=288),)
    ids = random_ids(model.config, 200)
    sampling = SamplingParams(temperature=0, max_tokens=700, ignore_eos=True)
    text = greedy(model, [ids], 700, eos_token_id=None)[0, 200:].tolist()
    engine = make_engine(model)
    first, second = (engine.generate([Request(ids, sampling)])[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 192)
    assert list(first.token_ids) == list(second.token_ids) == text
    assert engine.core.drafting.proposed > 0 and not caplog.records


@native
def test_mtp_layers_that_begin_within_the_sinks(tmp_path: Any) -> None:
    """The sinks that they have rows for end where the text was dropped."""
    save_with_mtp(tmp_path / "model", deepseek_v3())
    model = load_model(tmp_path / "model", **{**SLIDING, "attention_sinks": 100})
    model.dso.arena.manager.groups = (Forgetting(37, 100, spare=288),)
    ids = torch.tensor([random_ids(model.config, 340)])
    texts = []
    for use_mtp in (False, True):
        cache = PagedCache(model)
        model(ids[:, :40], **{cache_name(): cache})
        options = {"use_mtp": use_mtp, "num_assistant_tokens_schedule": "constant", cache_name(): cache}
        texts.append(greedy(model, ids, 200, eos_token_id=None, **options).tolist())
    assert texts[0] == texts[1] and model.dso.speculation.drafted > 20


@native
def test_a_draft_model_drops_blocks_too() -> None:
    pair, small = make_pair("llama-gqa", "cpu"), make_pair("llama-gqa", "cpu", **SLIDING).fast
    small.dso.arena.manager.groups = (Forgetting(37, 3, spare=64),)
    engine = make_engine(pair.fast, draft_model=small)
    prompt = pair.ids(1500)[0].tolist()
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    max_blocks, text = 0, []
    for outputs in engine.steps([Request(prompt, sampling, id="a")]):
        max_blocks = max(max_blocks, used(small))
        text += [token for output in outputs for token in output.token_ids]
    assert text == greedy(pair.fast, [prompt], 60, eos_token_id=None)[0, 1500:].tolist()
    assert 0 < max_blocks <= small.dso.arena.manager.forgetting.blocks(512)


# ---- settings and messages


def test_saved_models_keep_their_mode(tmp_path: Any) -> None:
    random_model(CASES["llama-gqa"]()).save_pretrained(tmp_path / "plain")
    model = load_model(tmp_path / "plain", precision="int8", backend="reference", **SLIDING)
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed")
    assert again.dso.config.attention == model.dso.config.attention
    ids = torch.tensor([random_ids(model.config, 200)])
    assert greedy(again, ids, 20).tolist() == greedy(model, ids, 20).tolist()
    other = load_model(tmp_path / "packed", attention_optimization="flash")
    assert other.report().attention.mode == "flash" and other.dso.arena.manager.forgetting is None


@pytest.mark.parametrize(
    ("case", "fields", "row", "message"),
    [
        ("llama-gqa", {}, ("flash", 0, 0, 0, 3, 0, False), "flash: all preceding tokens, in 3 layers"),
        ("llama-gqa", {"attention_optimization": "eager"}, ("eager", 0, 0, 0, 3, 0, False), "eager: all preceding tokens"),
        (
            "llama-gqa",
            SLIDING,
            ("sliding", 37, 3, 0, 3, 0, True),
            "the latest 37 tokens and the first 3, in 3 layers; the cache",
        ),
        ("llama-gqa", SPARSE, ("sparse", 40, 1, 160, 3, 0, False), "sparse: at most 160 tokens"),
        ("qwen2-windows", SPARSE, ("sparse", 40, 1, 160, 1, 2, False), "as trained in 2 layers"),
        ("qwen2-windows", {}, ("flash", 0, 0, 0, 1, 2, False), "in 1 layer; as trained in 2 layers"),
        ("deepseek_v32-indexer", SPARSE, ("sparse", 40, 1, 160, 0, 3, False), "sparse: as trained in 3 layers"),
        ("deepseek_v32-indexer", SLIDING, ("sliding", 37, 3, 0, 3, 0, True), "in 3 layers; the cache drops"),
    ],
)
def test_the_report(case: str, fields: dict[str, Any], row: tuple[Any, ...], message: str) -> None:
    report = make_pair(case, **fields).fast.report()
    actual = report.attention
    assert (actual.mode, actual.window, actual.sinks, actual.budget, actual.layers, actual.own, actual.forgets) == row
    assert message in " ".join(str(report).replace("│", " ").split())
    assert report.to_dict()["attention"]["mode"] == row[0]


@pytest.mark.parametrize(
    ("precision", "fields", "kind"),
    [
        ("int8", {"sparse_attention": True}, "int8"),
        ("fp32", {"sparse_attention": True}, "fp32"),
        ("int8", {"sparse_attention": True, "kv_cache": "bf16"}, "bf16"),
        ("int8", {"attention_optimization": "sparse"}, "bf16"),
    ],
)
def test_storage_of_the_cache(precision: str, fields: dict[str, Any], kind: str) -> None:
    model = random_model(CASES["llama-gqa"]())
    config = DeepSeekConfig(precision=precision, backend="reference", **fields)
    report = DynamicGraphOptimizer(model, config=config).optimize().report()
    assert report.kv_cache == kind
    assert ("int8 (sparse_attention)" in str(report)) == (kind == "int8")


def test_transformers_forward_warns_that_it_attends_to_everything() -> None:
    pair = make_pair("llama-gqa", **SLIDING)
    ids = pair.ids(120)
    with pytest.warns(OptimizerWarning, match="without sliding attention: every token attends to all before it"):
        hooked = pair.fast(ids, output_attentions=True)
    assert_close_rows(hooked.logits[0], pair.plain(ids).logits[0], 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.fast(ids, output_attentions=True)  # reported once
    with pytest.warns(OptimizerWarning) as warned:
        make_pair("llama-gqa").fast(ids, output_attentions=True)
    assert not any("without sliding" in str(w.message) for w in warned)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_optimization": "sparse", "attention_budget": 64}, "attention_budget"),
        ({"attention_optimization": "sliding", "sparse_attention": True}, "choose one"),
    ],
)
def test_incompatible_settings_are_rejected_first(fields: dict[str, Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "nothing-here", DeepSeekConfig(**fields))
    random_model(CASES["llama-gqa"]()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "plain", **fields)
