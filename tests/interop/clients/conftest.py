"""A server with scripted answers for each file of tests, and the environment of clients that would call home."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.chats import HERMES
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

MODEL = "fake-model"
os.environ |= {
    "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}  # fmt: skip

Answer = Callable[[str], str]


def tool_call(tool: str, **arguments: Any) -> str:
    """What a model writes to call a tool, in the format of `HERMES`."""
    return f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


@pytest.fixture(scope="module")
def start(byte_tokenizer) -> Iterator[Callable[[Answer], LiveServer]]:
    """start(answer): a server whose model writes `answer(prompt)`; its chat template has tools."""
    running: list[LiveServer] = []
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]})

    def started(answer: Answer) -> LiveServer:
        engine = FakeEngine(tokenizer, script=lambda request: answer(tokenizer.decode(request.prompt)), context=1 << 17)
        running.append(LiveServer(engine).__enter__())
        return running[-1]

    yield started
    for live in running:
        live.__exit__()
