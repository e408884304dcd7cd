"""Traces: when requests come, how long they are, and what their prompts have in common.

A file has one JSON object per line: "at" (in seconds), "prompt_tokens", "new_tokens", and for prompts with a common beginning
"group" (its name) and "shared_tokens" (its length). Instead of "prompt_tokens", "prompt" may be the text itself.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import DataError, shown


@dataclass(frozen=True)
class TraceRequest:
    """A request.

    Attributes:
        at: when it comes, in seconds.
        prompt_tokens, new_tokens: lengths.
        group, shared_tokens: the prompts of a group begin with the same tokens, so many.
        prompt: the text; None: any of this length.
        accepted: probability that a draft is accepted, where requests are simulated; 0: there are no drafts.
    """

    at: float
    prompt_tokens: int
    new_tokens: int
    group: str = ""
    shared_tokens: int = 0
    prompt: str | None = None
    accepted: float = 0.0


Trace = tuple[TraceRequest, ...]


def read_trace(path: Path) -> Trace:
    """A trace from a file, by the time of its requests.

    Raises:
        DataError: a line is not valid, or there is none; it names line and field.
        OSError: the file cannot be read.
    """
    found = [_request(line, path, n) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not found:
        raise DataError("there are no requests; write one JSON object per line", file=path)
    first = min(request.at for request in found)
    return tuple(sorted((replace(request, at=request.at - first) for request in found), key=lambda request: request.at))


def _request(line: bytes, path: Path, number: int) -> TraceRequest:
    def error(message: str, field: str | None = None) -> DataError:
        return DataError(message, file=path, line=number, field=field)

    try:
        value = json.loads(line)
    except ValueError as cause:
        raise error(f"not valid JSON ({cause})") from None
    if not isinstance(value, dict):
        raise error("must be a JSON object with at, prompt_tokens and new_tokens")

    def count(name: str, low: int, default: int | None = None) -> int:
        given = value.get(name, default)
        if type(given) is not int or given < low:
            raise error(f"must be a whole number of at least {low}, got {shown(given)}", name)
        return given

    at, prompt, group = value.get("at", 0), value.get("prompt"), value.get("group", "")
    if type(at) not in (int, float) or not math.isfinite(at):
        raise error(f"must be a number of seconds, got {shown(at)}", "at")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise error(f"must be a text, got {shown(prompt)}", "prompt")
    if not isinstance(group, str):
        raise error(f"must be a text, got {shown(group)}", "group")
    length = count("prompt_tokens", 1, None if prompt is None else 1)
    shared = count("shared_tokens", 0, 0)
    if shared > length and prompt is None:
        raise error(f"must be at most prompt_tokens, {length}, got {shared}", "shared_tokens")
    return TraceRequest(float(at), length, count("new_tokens", 1), group, shared, prompt)


def chat(seed: int = 0) -> Trace:
    """Turns of conversations: each repeats the ones before it; 4 users, who read for a while."""
    rng, found = random.Random(seed), []
    for user in range(4):
        at, length = rng.random() * 2, 60
        for _turn in range(4):
            new = rng.randint(24, 64)
            found.append(TraceRequest(at, length + rng.randint(10, 60), new, f"user {user}", length))
            length = found[-1].prompt_tokens + new
            at += 1.5 + rng.random() * 2
    return tuple(sorted(found, key=lambda request: request.at))


def documents(seed: int = 0) -> Trace:
    """Long prompts with short answers, two questions for each document."""
    rng, found = random.Random(seed), []
    for document in range(4):
        length = rng.randint(800, 1600)
        for _question in range(2):
            found.append(
                TraceRequest(rng.random() * 6, length + rng.randint(10, 40), rng.randint(16, 48), str(document), length)
            )
    return tuple(sorted(found, key=lambda request: request.at))


def agents(seed: int = 0) -> Trace:
    """Bursts of calls that share a long prefix of instructions and tools, with short answers."""
    rng, found = random.Random(seed), []
    for burst in range(3):
        for _call in range(6):
            length = 900 + rng.randint(20, 200)
            found.append(TraceRequest(burst * 3 + rng.random() * 0.3, length, rng.randint(8, 40), "tools", 900))
    return tuple(sorted(found, key=lambda request: request.at))


BUILT_IN: Mapping[str, Callable[[], Trace]] = MappingProxyType({"chat": chat, "documents": documents, "agents": agents})


def shortened(trace: Trace, context: int) -> Trace:
    """The trace with prompts and answers that fit a context of so many tokens; half of it is for answers at most."""
    found = []
    for request in trace:
        new = min(request.new_tokens, context // 2)
        prompt = min(request.prompt_tokens, context - new)
        found.append(replace(request, new_tokens=new, prompt_tokens=prompt, shared_tokens=min(request.shared_tokens, prompt)))
    return tuple(found)


def prompts(trace: Trace, encode: Callable[[str], list[int]], text: list[int], vocabulary: int) -> list[list[int]]:
    """The tokens of each request's prompt: parts of a text, so that drafts are accepted as on natural texts.

    Args:
        trace: the requests.
        encode: text to tokens, for requests with a text of their own.
        text: tokens that prompts are taken from; empty: they are random.
        vocabulary: number of tokens.
    """
    rng = random.Random(1)
    groups: dict[str, list[int]] = {}
    found: list[list[int]] = []

    def some(count: int) -> list[int]:
        if len(text) <= count:
            return [rng.randrange(vocabulary) for _ in range(count)]
        begin = rng.randrange(len(text) - count)
        return text[begin : begin + count]

    for request in trace:
        if request.prompt is not None:
            found.append(encode(request.prompt))
            continue
        known = groups.setdefault(request.group, [])
        if len(known) < request.shared_tokens:
            known += some(request.shared_tokens - len(known))
        shared = known[: request.shared_tokens]
        found.append(shared + some(request.prompt_tokens - len(shared)))
    return found


def describe(trace: Trace) -> dict[str, Any]:
    """What a report says about a trace."""
    return {
        "requests": len(trace), "seconds": max(request.at for request in trace),
        "prompt_tokens": sum(request.prompt_tokens for request in trace),
        "new_tokens": sum(request.new_tokens for request in trace),
    }  # fmt: skip
