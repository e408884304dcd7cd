"""generate(): the same tokens as Transformers, through the fast loop and through Transformers' loops over the plan."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from deepseek_optimizer import PagedCache
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from deepseek_optimizer.integration.compat import cache_name
from deepseek_optimizer.integration.generation import generate as generate_module
from support.streamers import Recorder

from ..conftest import make_pair

EOS = 2


@pytest.fixture
def fast_loops(monkeypatch):
    """Counts the requests that used our own loop."""
    served, sample = [], generate_module._sample
    monkeypatch.setattr(generate_module, "_sample", lambda *a, **k: (served.append(1), sample(*a, **k))[1])
    return served


def both(pair, ids, seed=0, **options):
    """Tokens of Transformers and ours, from the same seed."""
    torch.manual_seed(seed)
    plain = pair.plain.generate(ids, **options)
    torch.manual_seed(seed)
    return plain, pair.fast.generate(ids, **options)


def assert_same(pair, ids, **options):
    plain, fast = both(pair, ids, **options)
    assert torch.equal(plain, fast)
    return fast


PLAIN = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.7},
    "no_repeat_ngram": {"do_sample": False, "no_repeat_ngram_size": 2},
    "bad_words": {"do_sample": False, "bad_words_ids": [[3], [7, 8]]},
    "min_new_tokens": {"do_sample": False, "min_new_tokens": 20},
    "forced_eos": {"do_sample": False, "forced_eos_token_id": 5},
    "all": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    "many": {"do_sample": True, "num_return_sequences": 3},
    "eos_list": {"do_sample": True, "eos_token_id": list(range(2, 30)), "pad_token_id": 0},
    "chunked": {"do_sample": False, "prefill_chunk_size": 4},
}
OTHER = {
    "beams": {"num_beams": 3, "do_sample": False},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "do_sample": False},
    "beam_sample": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "no_cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("lengths", [(9,), (11, 4, 7)], ids=["one", "left-padded"])
def test_plain_requests(pair, fast_loops, name, lengths):
    assert_same(
        pair, pair.ids(*lengths), attention_mask=pair.mask(*lengths), max_new_tokens=24,
        **{"pad_token_id": 0, "eos_token_id": EOS, **PLAIN[name]},
    )  # fmt: skip
    assert fast_loops == [1]


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("lengths", [(9,), (11, 4, 7)], ids=["one", "left-padded"])
def test_unsupported_requests_use_transformers_loops(pair, fast_loops, name, lengths):
    assert_same(
        pair,
        pair.ids(*lengths),
        attention_mask=pair.mask(*lengths),
        max_new_tokens=20,
        pad_token_id=0,
        eos_token_id=EOS,
        **OTHER[name],
    )
    assert fast_loops == []


@pytest.mark.parametrize("name", PLAIN)
def test_the_fast_loop_equals_transformers_loop(name):
    """With one plan, the logits are bitwise equal, and so are sampled tokens."""
    pair = make_pair()
    ids, options = pair.ids(10, 3), {"pad_token_id": 0, "eos_token_id": EOS, **PLAIN[name]}
    made = []
    for fast_path in (True, False):
        pair.fast.dso.config.fast_path = fast_path
        torch.manual_seed(1)
        made.append(pair.fast.generate(ids, attention_mask=pair.mask(10, 3), max_new_tokens=40, **options))
    assert torch.equal(*made)


def test_prompt_lookup(pair, fast_loops):
    ids = torch.cat([pair.ids(8)] * 3, dim=1)
    assert_same(pair, ids, prompt_lookup_num_tokens=3, max_new_tokens=30, do_sample=False)
    assert fast_loops == []


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "sampled"])
def test_assistant_model(pair, options):
    from support.models import CASES, random_model

    assistant = random_model(CASES["llama-one-layer"](), seed=3)
    assert_same(pair, pair.ids(9), assistant_model=assistant, max_new_tokens=20, **options)


def test_optimized_assistant_of_an_optimized_model(pair):
    assistant = make_pair("llama-one-layer")
    ids = pair.ids(9)
    plain = pair.plain.generate(ids, assistant_model=assistant.plain, max_new_tokens=25, do_sample=False)
    fast = pair.fast.generate(ids, assistant_model=assistant.fast, max_new_tokens=25, do_sample=False)
    assert torch.equal(plain, fast)


def test_num_return_sequences_computes_a_prompt_once(fresh_pair, monkeypatch):
    tokens = []
    run = fresh_pair.fast.dso.plan.run
    monkeypatch.setattr(fresh_pair.fast.dso.plan, "run", lambda b, s: (tokens.append(len(b.positions)), run(b, s))[1])
    fresh_pair.fast.generate(fresh_pair.ids(50), num_return_sequences=4, do_sample=True, max_new_tokens=3)
    assert tokens == [50, 4, 4]


def test_finished_rows_are_not_computed(fresh_pair, monkeypatch):
    rows = []
    run = fresh_pair.fast.dso.plan.run
    monkeypatch.setattr(fresh_pair.fast.dso.plan, "run", lambda b, s: (rows.append(len(b.query_len)), run(b, s))[1])
    options = {"do_sample": True, "max_new_tokens": 60, "eos_token_id": list(range(2, 12)), "pad_token_id": 0}
    assert_same(fresh_pair, fresh_pair.ids(6, 6, 6, 6), **options)
    assert rows[0] == 4
    assert rows[-1] < 4


def test_scores_and_logits(pair):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "top_k": 5, "pad_token_id": 0}
    plain, fast = both(pair, pair.ids(7, 7), do_sample=True, max_new_tokens=12, eos_token_id=list(range(2, 40)), **options)
    assert type(plain) is type(fast)
    assert torch.equal(plain.sequences, fast.sequences)
    assert len(plain.scores) == len(fast.scores)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(plain, name), getattr(fast, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert getattr(fast, cache_name()).get_seq_length() == getattr(plain, cache_name()).get_seq_length()
    torch.testing.assert_close(
        pair.fast.compute_transition_scores(fast.sequences, fast.scores, normalize_logits=True),
        pair.plain.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_hidden_states_of_generate(pair):
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False, "max_new_tokens": 4}
    plain, fast = both(pair, pair.ids(5), **options)
    for a, b in zip(plain.hidden_states, fast.hidden_states, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_streamer_gets_the_prompt_and_every_token(pair, fast_loops):
    streamer, ids = Recorder(), pair.ids(5)
    out = pair.fast.generate(ids, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.pieces == [ids.tolist()] + [[t] for t in out[0, 5:].tolist()]
    assert streamer.ended
    assert fast_loops == [1]


def test_text_iterator_streamer_in_a_thread(tiny_model, byte_tokenizer):
    from deepseek_optimizer import load_model

    model = load_model(tiny_model, backend="reference")
    inputs = byte_tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
    whole = byte_tokenizer.decode(model.generate(**inputs, max_new_tokens=9, do_sample=False)[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(byte_tokenizer, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "max_new_tokens": 9, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    try:
        assert "".join(streamer) == whole
    except queue.Empty:
        pytest.fail("the streamer got nothing for a minute")
    thread.join()


def test_two_threads_at_once(pair):
    """Caches of one model share an arena; answers do not interfere."""
    prompts = [pair.ids(6, seed=i) for i in range(4)]
    expected = [pair.fast.generate(p, max_new_tokens=40, do_sample=False) for p in prompts]
    made = [None] * 4

    def work(i):
        made[i] = pair.fast.generate(prompts[i], max_new_tokens=40, do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, made, strict=True))


def test_stop_strings(tiny_model, byte_tokenizer, fast_loops):
    from transformers import AutoModelForCausalLM

    from deepseek_optimizer import load_model

    plain, fast = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        load_model(tiny_model, backend="reference"),
    )
    inputs = byte_tokenizer("abc", return_tensors="pt", return_token_type_ids=False)
    whole = plain.generate(**inputs, max_new_tokens=30, do_sample=False)[0, 3:].tolist()
    stop = byte_tokenizer.decode(whole[4:6])
    options = {"max_new_tokens": 30, "do_sample": False, "stop_strings": [stop], "tokenizer": byte_tokenizer}
    a, b = plain.generate(**inputs, **options), fast.generate(**inputs, **options)
    assert torch.equal(a, b)
    assert b.shape[1] < 33
    assert fast_loops == [1]


def test_custom_stopping_criteria_and_processors(pair, fast_loops):
    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(int(input_ids[0, -1]) % 7, dims=-1)

    options = {"stopping_criteria": StoppingCriteriaList([After()]), "logits_processor": [Shift()]}
    out = assert_same(pair, pair.ids(5, 5), max_new_tokens=50, do_sample=False, pad_token_id=0, **options)
    assert out.shape[1] == 12
    assert fast_loops == [1]


def test_generation_config_object(pair):
    config = GenerationConfig(max_new_tokens=9, do_sample=True, top_k=4, pad_token_id=0)
    assert_same(pair, pair.ids(4), generation_config=config)


def test_inputs_embeds(pair):
    embeds = pair.plain.get_input_embeddings()(pair.ids(7)).detach()
    options = {"inputs_embeds": embeds, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(pair.plain.generate(**options), pair.fast.generate(**options))


def test_a_conversation_with_one_cache(pair):
    """Each turn passes the whole history and the cache of the previous turn."""
    cache, plain_cache, ids = PagedCache(pair.fast), DynamicCache(), pair.ids(6)
    for turn in range(3):
        out = pair.fast.generate(ids, max_new_tokens=5, do_sample=False, **{cache_name(): cache})
        plain = pair.plain.generate(ids, max_new_tokens=5, do_sample=False, **{cache_name(): plain_cache})
        assert torch.equal(out, plain)
        assert cache.get_seq_length() == plain_cache.get_seq_length()
        ids = torch.cat([out, pair.ids(4, seed=turn)], dim=1)


def test_other_caches_go_through_transformers(fresh_pair):
    ids = fresh_pair.ids(6)
    plain = fresh_pair.plain.generate(ids, max_new_tokens=5, do_sample=False)
    with pytest.warns(OptimizerWarning, match="DynamicCache"):
        fast = fresh_pair.fast.generate(ids, max_new_tokens=5, do_sample=False, **{cache_name(): DynamicCache()})
    assert torch.equal(plain, fast)


def test_hooks_send_generate_through_transformers(fresh_pair):
    ids, seen = fresh_pair.ids(6), []
    fresh_pair.fast.model.layers[0].register_forward_hook(lambda *a: seen.append(1))
    with pytest.warns(OptimizerWarning, match="hooks"):
        fast = fresh_pair.fast.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(fast, fresh_pair.plain.generate(ids, max_new_tokens=5, do_sample=False))
    assert len(seen) == 5


def test_blocks_are_freed(fresh_pair):
    model = fresh_pair.fast
    model.generate(fresh_pair.ids(40, 40), max_new_tokens=40, num_beams=3, do_sample=False)
    model.generate(fresh_pair.ids(40, 40), max_new_tokens=40, do_sample=True)
    manager = model.dso.arena.manager
    assert manager.free_blocks == manager.num_blocks


def test_the_context_ends_generation():
    pair = make_pair("llama-gqa")
    pair.fast.dso.graph.max_positions = 20
    with pytest.warns(OptimizerWarning, match="context of 20"):
        out = pair.fast.generate(pair.ids(10), max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert torch.equal(out, pair.plain.generate(pair.ids(10), max_new_tokens=11, do_sample=False, eos_token_id=None))
    assert pair.fast.generate(pair.ids(10), max_new_tokens=50, num_beams=2, do_sample=False, eos_token_id=None).shape[1] <= 21
    with pytest.raises(ValueError, match="21 tokens, more than the model's context of 20; shorten"):
        pair.fast.generate(pair.ids(21), max_new_tokens=1)


BAD = [
    ({"temperature": float("nan"), "do_sample": True}, "temperature"),
    ({"temperature": float("inf"), "do_sample": True}, "temperature"),
    ({"temperature": 0.0, "do_sample": True}, "temperature"),
    ({"temperature": -1.0, "do_sample": True}, "temperature"),
    ({"temperature": True, "do_sample": True}, "temperature"),
    ({"temperature": 1e-300, "do_sample": True}, "temperature must be from 1e-30.*do_sample=False"),
    ({"temperature": 1e300, "do_sample": True}, "temperature"),
    ({"repetition_penalty": 1e-300, "do_sample": True}, "repetition_penalty"),
    ({"repetition_penalty": 1e300}, "repetition_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"encoder_repetition_penalty": 1e300, "do_sample": True}, "encoder_repetition_penalty"),
    ({"guidance_scale": 1e300, "do_sample": True}, "guidance_scale"),
    ({"length_penalty": 1e10, "num_beams": 2}, "length_penalty"),
    ({"temperature": "1", "do_sample": True}, "temperature"),
    ({"top_p": float("nan"), "do_sample": True}, "top_p"),
    ({"top_p": 1.5, "do_sample": True}, "top_p"),
    ({"min_p": float("nan"), "do_sample": True}, "min_p"),
    ({"top_k": -1, "do_sample": True}, "top_k"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ({"repetition_penalty": 0.0}, "penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -5}, "max_new_tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"num_beams": 0}, "num_beams"),
    ({"assistant_confidence_threshold": 1.5}, "assistant_confidence_threshold must be from 0 to 1"),
    ({"assistant_confidence_threshold": "0.5"}, "assistant_confidence_threshold must be a finite number"),
    ({"num_return_sequences": 1 << 40, "do_sample": True}, "num_return_sequences"),
    ({"attention_mask": torch.ones(1, 2)}, "attention_mask has shape"),
    ({"no_such_option": 1}, "no_such_option"),
]


@pytest.mark.parametrize(("options", "name"), BAD, ids=[f"{n}-{i}" for i, (_, n) in enumerate(BAD)])
def test_invalid_options(pair, options, name):
    with pytest.raises(ValueError, match=name):
        pair.fast.generate(pair.ids(3), **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.empty(1, 0, dtype=torch.long), "empty"),
        (torch.empty(0, 3, dtype=torch.long), "empty"),
        (torch.tensor([[5, 211]]), "outside the vocabulary of 211"),
        (torch.tensor([[-3]]), "outside the vocabulary"),
        (torch.zeros(1, 5000, dtype=torch.long), "context of 4096"),
        (torch.tensor([1, 2]), "batch, tokens"),
        ([[1, 2]], "batch, tokens"),
        (torch.tensor([[1.0, 2.0]]), "integer token ids, got torch.float32"),
        (torch.tensor([[True]]), "integer token ids"),
        (torch.zeros(1, 2, 72, dtype=torch.long), "floating point embeddings"),
    ],
)
def test_invalid_prompts(pair, ids, message):
    with pytest.raises(ValueError, match=message):
        pair.fast.generate(ids, max_new_tokens=3)


def test_a_stopped_stream_leaks_nothing(fresh_pair):
    class Stop(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.pieces) == 4:
                raise KeyboardInterrupt

    model = fresh_pair.fast
    with pytest.raises(KeyboardInterrupt):
        model.generate(fresh_pair.ids(5), max_new_tokens=30, do_sample=False, streamer=Stop())
    assert_same(fresh_pair, fresh_pair.ids(5), max_new_tokens=5, do_sample=False)
    assert model.dso.arena.manager.free_blocks == model.dso.arena.manager.num_blocks


def test_torch_has_one_thread_with_the_native_backend(pair):
    """Its thread count is restored afterwards, even if requests overlap."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = []

    class Watch(BaseStreamer):
        def put(self, value):
            seen.append(torch.get_num_threads())

        def end(self):
            pass

    def request():
        pair.fast.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, streamer=Watch())

    try:
        threads = [threading.Thread(target=request) for _ in range(4)]
        for thread in threads:
            thread.start()
        request()
        for thread in threads:
            thread.join()
        assert torch.get_num_threads() == 3
        native = pair.fast.dso.backend.name == "cpu"
        assert set(seen) == ({1} if native else {3})
    finally:
        torch.set_num_threads(before)


def test_first_requests_of_several_threads(fresh_pair):
    """The plan and the cache memory, created by the first request, are created once despite concurrent requests."""
    model, ids = fresh_pair.fast, fresh_pair.ids(5)
    model.dso.replaced()
    start = threading.Barrier(6)

    def request(_):
        start.wait()
        return model.generate(ids, max_new_tokens=8, do_sample=False).tolist()

    with ThreadPoolExecutor(6) as pool:
        actual = list(pool.map(request, range(6)))
    assert all(one == actual[0] for one in actual)
    assert model.dso.arena.manager.free_blocks == model.dso.arena.manager.num_blocks
