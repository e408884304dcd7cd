"""Keys of prompts: requests that begin alike share their first keys, and no others."""

from __future__ import annotations

import json
import random

import pytest

from deepseek_optimizer.ray.prefix_keys import prefix_keys


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def shared(one: list[str], other: list[str]) -> int:
    """The number of first keys that two requests have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_a_continued_chat_has_the_keys_of_its_earlier_turns() -> None:
    messages = [{"role": "user", "content": "x" * 2000}]
    first = prefix_keys(body(model="m", messages=messages))
    messages += [{"role": "assistant", "content": "y" * 2000}, {"role": "user", "content": "z"}]
    second = prefix_keys(body(messages=messages, model="m", temperature=0.5))
    assert len(first) == 7 and shared(first, second) == 7


@pytest.mark.parametrize(
    "field",
    [{"system": "s"}, {"tools": [{"name": "t"}]}, {"instructions": "i"}, {"model": "other"}],
    ids=lambda field: next(iter(field)),
)
def test_what_precedes_the_messages_is_part_of_the_prefix(field) -> None:
    messages = [{"role": "user", "content": "x" * 2000}]
    assert shared(prefix_keys(body(messages=messages)), prefix_keys(body(messages=messages, **field))) == 0


@pytest.mark.parametrize("name", ["prompt", "input", "inputs"])
def test_texts_that_differ_at_a_place_share_the_keys_before_it(name: str) -> None:
    random.seed(0)
    text = "".join(random.choices("abcdefgh", k=100_000))
    keys = prefix_keys(body(**{name: text}))
    before = len(f'["{name}"]')
    for place in (0, 255, 256, 3000, 20_000, 99_000):
        changed = text[:place] + "X" + text[place + 1 :]
        count = shared(keys, prefix_keys(body(**{name: changed})))
        covered = 256 * count if count <= 64 else 64 * 256 + 4096 * (count - 64)
        assert covered <= place + before < covered + 4096 + before, place


@pytest.mark.parametrize(
    "request_body",
    [b"", b"{", b"\xff", b"[1]", b"3", body(model="m"), body(messages=[]), body(messages=3), b"[" * 100_000],
)  # fmt: skip
def test_requests_without_a_prompt_have_no_keys(request_body: bytes) -> None:
    assert prefix_keys(request_body) == []


def test_short_prompts_have_one_key_and_long_ones_a_bounded_number() -> None:
    assert len(prefix_keys(body(prompt="hello"))) == 1
    assert prefix_keys(body(prompt="hello")) != prefix_keys(body(prompt="hellp"))
    assert len(prefix_keys(body(prompt="x" * 5_000_000))) <= 200


def test_bodies_that_the_server_refuses_have_no_keys() -> None:
    assert not prefix_keys(b'{"prompt": "\\ud800"}')
    nested = "[" * 300 + "]" * 300
    assert not prefix_keys(b'{"prompt": [%s]}' % nested.encode())
    many = b'{"prompt": [%s1]}' % (b"1," * (3 << 20))
    assert not prefix_keys(many) and prefix_keys(many.replace(b"1," * (2 << 20), b""))


def test_large_pictures_have_keys() -> None:
    url = {"url": "data:image/png;base64," + "A" * (6 << 20)}
    text, picture = {"type": "text", "text": "x" * 1000}, {"type": "image_url", "image_url": url}
    one = [{"role": "user", "content": [text, picture]}]
    assert shared(prefix_keys(body(messages=one)), prefix_keys(body(messages=[*one, {"role": "user", "content": "y"}]))) > 100
