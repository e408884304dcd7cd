"""A coding agent's loop over /v1/messages: many turns with tools, and most of each prompt found in the prefix cache."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.serving import make_async_engine
from support.chats import HERMES
from support.live_server import LiveServer
from support.saved_llama import saved_llama

TURNS = 50
COMMANDS = ["ls", "cat a.py", "pytest -q", "git diff"]
BASH = {
    "name": "bash",
    "description": "Runs a command",
    "input_schema": {
        "type": "object",
        "properties": {"command": {"enum": COMMANDS}},
        "required": ["command"],
        "additionalProperties": False,
    },
}
SYSTEM = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};"},
    {"type": "text", "text": "You write code and run it. " * 150, "cache_control": {"type": "ephemeral"}},
]


@pytest.fixture(scope="module")
def live(tmp_path_factory, byte_tokenizer):
    folder = saved_llama(tmp_path_factory.mktemp("agent") / "model", byte_tokenizer, max_position_embeddings=16_384)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = HERMES
    model = load_model(folder, precision="fp32", kv_cache_memory=1 << 26)
    with LiveServer(make_async_engine(model, tokenizer, model_name="tiny")) as running:
        yield running


def test_fifty_turns_with_a_cached_prefix(live):
    """The model's text is random, but forced to be a call: what an agent sends back is what it received."""
    messages: list[dict] = [{"role": "user", "content": "Fix the bug"}]
    earlier = 0  # tokens of the prompt and the answer of the turn before
    for turn in range(TURNS):
        system = [{**SYSTEM[0], "text": SYSTEM[0]["text"].format(turn=turn)}, SYSTEM[1]]
        body = {
            "model": "tiny", "max_tokens": 200, "system": system, "tools": [BASH], "messages": messages, "temperature": 1.0,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        }  # fmt: skip
        response = live.client.post("/v1/messages", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["stop_reason"] == "tool_use"
        calls = [block for block in answer["content"] if block["type"] == "tool_use"]
        assert all(call["input"]["command"] in COMMANDS for call in calls)
        usage = answer["usage"]
        assert usage["cache_read_input_tokens"] >= 0.95 * earlier
        earlier = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"]
        results = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": f"{call['input']['command']}: line {turn}\n" * 2}
            for call in calls
        ]
        messages += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": results}]
    assert earlier > 8_000
