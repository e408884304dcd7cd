"""Pictures in an engine: the same tokens as `generate`, in company, from the prefix cache and after preemption."""

from __future__ import annotations

import asyncio

import pytest
import torch

from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer
from deepseek_optimizer.engine.request import Request, SamplingParams
from deepseek_optimizer.errors import RequestError
from deepseek_optimizer.integration.multimodal import PictureEncoder
from deepseek_optimizer.serving import make_async_engine, make_engine
from support.picture_processors import PLACEHOLDER, count_encoded, make_pair, picture

CONFIG = DeepSeekConfig(precision="fp32", kv_cache="fp32", prefill_chunk=48)
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=PLACEHOLDER)
def pair(request):
    """An optimized model, the same one with Transformers' own code, and the processor."""
    plain, processor = make_pair(request.param)
    ours, _ = make_pair(request.param)
    return DynamicGraphOptimizer(ours, config=CONFIG).optimize(), plain, processor


def chat(processor, *turns):
    """The text of a chat whose user turns are tuples of texts, and of pictures as None."""
    messages = [
        {"role": role, "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]}
        for role, parts in turns
    ]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def ids_of(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected_tokens(plain, processor, text, images):
    if images:
        inputs = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    else:
        inputs = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    eos = plain.generation_config.eos_token_id
    plain.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = plain.generate(**inputs, max_new_tokens=6, do_sample=False)[0, count:].tolist()
    plain.generation_config.eos_token_id = eos
    return tokens


def test_in_company(pair):
    """Prompts with no, one and several pictures at once, in chunks that end anywhere."""
    ours, plain, processor = pair
    encoder = PictureEncoder(ours, processor)
    pictures = [picture(33, 21, 1), picture(17, 40, 2), picture(24, 24, 3)]
    prompts = [
        (chat(processor, ("user", (None, "what is it"))), pictures[:1]),
        (chat(processor, ("user", ("no picture here",))), []),
        (
            chat(
                processor,
                ("user", ("first", None, "second", None, "third", None)),
            ),
            pictures,
        ),
    ]
    engine = make_engine(ours, processor.tokenizer, step_tokens=13)
    requests = []
    for n, (text, images) in enumerate(prompts):
        ids, rows = encoder.prompt(ids_of(processor, text), images)
        requests.append(Request(ids, GREEDY, id=str(n), pictures=rows))
    completions = engine.generate(requests)
    for completion, (text, images) in zip(completions, prompts, strict=True):
        assert completion.error is None
        assert completion.token_ids == expected_tokens(plain, processor, text, images)


def test_prefixes(pair):
    """A second turn continues from the first one's blocks; the same text with another picture does not."""
    ours, plain, processor = pair
    encoder = PictureEncoder(ours, processor)
    first, other = picture(40, 40, 4), picture(40, 40, 5)
    turns = [("user", ("a long text before the picture, longer than one block", None, "and after it"))]
    engine = make_engine(ours, processor.tokenizer)

    def run(text, *images):
        ids, rows = encoder.prompt(ids_of(processor, text), images)
        completion = engine.generate([Request(ids, GREEDY, pictures=rows)])[0]
        assert completion.token_ids == expected_tokens(plain, processor, text, list(images))
        return completion.cached_tokens, len(ids)

    assert run(chat(processor, *turns), first)[0] == 0
    cached, count = run(chat(processor, *turns), first)
    assert cached == (count - 1) // 32 * 32
    cached, _ = run(chat(processor, *turns), other)
    assert 0 < cached <= 64  # the blocks before the picture
    turns += [("assistant", ("x",)), ("user", (None, "and this"))]
    cached, more = run(chat(processor, *turns), first, other)
    assert cached == count // 32 * 32 and more > count


def test_a_next_question_computes_only_what_is_new(pair):
    """Also of the last, partly filled block, which has tokens of a picture, of the question or of the answer."""
    ours, _, processor = pair
    encoder = PictureEncoder(ours, processor)
    engine, plain = (make_engine(ours, processor.tokenizer, prefix_cache=kept) for kept in (True, False))
    for n, (before, after) in enumerate([(4, 0), (9, 3), (17, 30)]):
        text = chat(processor, ("user", ("b" * before, None, "a" * after)))
        ids, rows = encoder.prompt(ids_of(processor, text), [picture(40, 40, 20 + n)])
        for turn in range(3):
            cached = len(ids) - 6 if turn else 0  # all but the question and the last token of the answer
            request = Request(list(ids), GREEDY, pictures=rows)
            answer, expected = (e.generate([request])[0] for e in (engine, plain))
            assert answer.token_ids == expected.token_ids
            assert answer.cached_tokens == (cached if cached >= 32 else 0)
            ids = [*ids, *answer.token_ids, *ids_of(processor, "next?")]
            rows = rows.followed_by(len(ids) - rows.tokens)


def test_preemption_and_a_full_cache(pair):
    ours, plain, processor = pair
    encoder = PictureEncoder(ours, processor)
    text, images = chat(processor, ("user", (None, "what is it", None))), [picture(40, 40, 6), picture(21, 40, 7)]
    arena = ours.dso.new_arena(5 * ours.dso.language._block_bytes * len(ours.dso.graph.cache.layer_groups or (0,)))
    engine = make_engine(ours, processor.tokenizer, arena=arena, prefix_cache=False)
    requests = []
    for n in range(3):
        ids, rows = encoder.prompt(ids_of(processor, text), images)
        requests.append(Request(ids, GREEDY, id=str(n), pictures=rows))
    expected = expected_tokens(plain, processor, text, images)
    assert [completion.token_ids for completion in engine.generate(requests)] == [expected] * 3


def test_errors(pair):
    ours, _, processor = pair
    encoder = PictureEncoder(ours, processor)
    text = chat(processor, ("user", (None, "what")))
    with pytest.raises(RequestError, match="has places for 1 pictures, but there are 2"):
        encoder.prompt(ids_of(processor, text), [picture(9, 30), picture(30, 9)])
    ids, rows = encoder.prompt(ids_of(processor, text), [picture(24, 24)])
    with pytest.raises(RequestError, match="are those of a prompt with"):
        Request(ids[:-1], pictures=rows)
    if len(ours.dso.graph.cache.layer_groups) == 0:  # otherwise there are no such windows
        engine = make_engine(ours, processor.tokenizer, cache_window=128)
        with pytest.raises(RequestError, match="cache_window"):
            engine.generate([Request(ids, GREEDY, pictures=rows)])


def test_encoding_beside_a_stream(pair):
    """In pieces, between which the stream continues: neither changes the other's results."""
    ours, _, processor = pair
    text = ids_of(processor, chat(processor, ("user", (None, "and", None))))
    images = [picture(40, 40, 10), picture(20, 30, 11)]
    _, alone = PictureEncoder(ours, processor).prompt(text, images)
    long = Request([5, 6, 7], SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))
    expected = make_engine(ours, processor.tokenizer).generate([long])[0].token_ids
    encoder = PictureEncoder(ours, processor)
    pieces = []
    next_piece = encoder.pace.next_piece
    encoder.pace.next_piece = lambda: pieces.append(next_piece()) or pieces[-1]

    async def main():
        engine = make_async_engine(ours, processor.tokenizer, pictures=encoder)
        await engine.start()
        tokens, encoding = [], None
        with engine.admit():
            async for output in engine.submit(Request([5, 6, 7], long.sampling)):
                tokens += output.token_ids
                encoding = encoding or asyncio.create_task(asyncio.to_thread(encoder.prompt, text, images))
        _, rows = await encoding
        await engine.close()
        return tokens, rows

    tokens, rows = asyncio.run(asyncio.wait_for(main(), 120))
    assert tokens == expected
    assert torch.equal(rows.embeds, alone.embeds)
    assert all(torch.equal(one, other) for one, other in zip(rows.features, alone.features, strict=True))
    assert len(pieces) >= 4  # two pictures, whose layers have two parts each


def test_pictures_are_encoded_once(pair, monkeypatch):
    ours, _, processor = pair
    encoder = PictureEncoder(ours, processor)
    calls = count_encoded(monkeypatch, ours)
    one, two = picture(30, 20, 8), picture(20, 30, 9)
    text = ids_of(processor, chat(processor, ("user", (None, "and", None))))
    _, first = encoder.prompt(text, [one, two])
    _, second = encoder.prompt(text, [one, two])
    assert len(calls) == 2
    assert torch.equal(first.embeds, second.embeds)
    small = PictureEncoder(ours, processor, kept_bytes=1)
    small.prompt(text, [one, two])
    small.prompt(text, [two, one])
    assert len(calls) == 5  # the last one is kept
    none = PictureEncoder(ours, processor, kept_bytes=0)
    none.prompt(text, [one, two])
    none.prompt(text, [two, one])
    assert len(calls) == 9


def test_pictures_are_shared_within_a_salt_only(pair, monkeypatch):
    ours, _, processor = pair
    encoder = PictureEncoder(ours, processor)
    calls = count_encoded(monkeypatch, ours)
    text = ids_of(processor, chat(processor, ("user", (None,))))
    found = {salt: encoder.prompt(text, [picture(30, 20, 8)], salt)[1] for salt in ("", "a", "b", "a", "")}
    assert len(calls) == 3
    assert torch.equal(found["a"].embeds, found["b"].embeds)


def test_pipeline(pair):
    """Transformers' own pipeline, with the optimized model in place of the plain one."""
    from transformers import pipeline

    ours, plain, processor = pair
    content = [{"type": "image", "image": picture(33, 21, 1)}, {"type": "text", "text": "what is it"}]
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": 5, "do_sample": False}
    texts = [
        pipeline("image-text-to-text", model=model, processor=processor)(
            text=messages, generate_kwargs=options, return_full_text=False
        )[0]
        for model in (ours, plain)
    ]
    assert texts[0]["generated_text"] == texts[1]["generated_text"]
