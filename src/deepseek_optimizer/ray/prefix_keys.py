"""Keys of the beginnings of a request's prompt: requests that begin alike share their first keys.

A prompt is taken as text, before a chat template and a tokenizer: what precedes the first message, then the messages or the
prompt, as JSON. The text is cut at fixed places, and the key of each place is a hash of all the text before it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

_STEP, _STEPS = 256, 64  # bytes between the first places, and their number
_LATER = 4096  # bytes between the places that follow
_LONGEST = 512 << 10  # bytes of text that have keys
_TEXT_BODY, _MAX_MARKS = 4 << 20, 100_000  # a larger body has pictures, and not many values, or the server refuses it
_DIGITS = 8  # of a key; beginnings that differ have the same key once in 2^32 times, which costs a detour
# Fields of the protocols that are served (OpenAI's, Anthropic's, Ollama's, llama-server's), in the order in which templates
# place them in a prompt.
_BEFORE = ("model", "tools", "instructions", "system", "previous_response_id", "input_prefix")
_PROMPTS = ("messages", "prompt", "input", "inputs")


def prefix_keys(body: bytes) -> list[str]:
    """The keys of a request's prompt, those of shorter beginnings first; empty if it has no prompt.

    Args:
        body: of the request; it need not be valid.
    """
    if len(body) > _TEXT_BODY and body.count(b",") > _MAX_MARKS:  # would keep the proxy's other requests waiting
        return []
    try:
        text = _text(orjson.loads(body))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # the latter: nested too deeply; the server refuses both
        return []
    if text is None:
        return []
    digest, keys, begin = hashlib.blake2b(digest_size=_DIGITS // 2), [], 0
    for end in _places(len(text)):
        digest.update(text[begin:end])
        keys.append(digest.hexdigest())
        begin = end
    return keys


def _text(request: Any) -> bytes | None:
    """What precedes an answer, as bytes; None: nothing does."""
    if not isinstance(request, dict):
        return None
    name = next((name for name in _PROMPTS if isinstance(request.get(name), str | list) and request[name]), None)
    if name is None:
        return None
    parts = [[field, request[field]] for field in _BEFORE if request.get(field)]
    # Without the brackets at the end, the text of a conversation is the beginning of its continuation's.
    return orjson.dumps([*parts, request[name][:_LONGEST]]).rstrip(b'"]}')


def _places(length: int) -> list[int]:
    """Where a text is cut: its length in bytes is the last place, if it is shorter than a step."""
    length = min(length, _LONGEST)
    near = range(_STEP, min(length, _STEP * _STEPS) + 1, _STEP)
    far = range(_STEP * _STEPS + _LATER, length + 1, _LATER)
    return [*near, *far] or [length]
