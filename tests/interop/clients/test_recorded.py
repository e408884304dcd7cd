"""Requests of clients that are not Python packages: each file of `recorded/` lists what one of them sends, with what it reads
of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import tool_call

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
CALLS = [(file.stem, call) for file in RECORDED for call in json.loads(file.read_text(encoding="utf-8"))["calls"]]


@pytest.fixture(scope="module")
def client(start):
    return start(lambda prompt: tool_call("weather", city="Rom") if "<tools>" in prompt else '{"title": "Hello"}').client


def pick(value: Any, path: str) -> Any:
    """The value at a path such as "choices.0.delta"; None where there is none."""
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def parts(text: str, form: str) -> list[Any]:
    """The objects of a stream: server-sent events, or lines of JSON."""
    lines = [line for line in text.splitlines() if line]
    if form == "lines":
        return [json.loads(line) for line in lines]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[f"{name}: {call['what']}" for name, call in CALLS])
def test_call(client, name, call):
    reply = client.request(call.get("method", "POST"), call["path"], json=call.get("body"), headers=call.get("headers"))
    assert reply.status_code == 200, reply.text
    if "stream" in call:
        read = [pick(part, path) for part in parts(reply.text, call["stream"]) for path in call["reads"]]
        assert any(read), reply.text[:1000]
    else:
        for path in call["reads"]:
            assert pick(reply.json(), path) is not None, (path, reply.text[:1000])
