"""OpenAI's older form of tools: `functions` and `function_call` in requests, messages and answers.

They are converted to tools; an answer has one call.
"""

from __future__ import annotations

from typing import Any

import orjson

from ...chat.deltas import Delta, ToolCallDelta
from ..http.problems import ApiError
from ..protocol.chat import ChatRequest
from ..protocol.messages import NamedFunction, NamedTool, Tool
from .chat_answers import ChatAnswer, ChatCollector, ChatEncoder


def with_tools(body: ChatRequest) -> ChatRequest:
    """The request with tools in place of functions; itself if it has none.

    Raises:
        ApiError: 400, the request has both tools and functions.
    """
    if body.functions is None:
        return body
    if body.tools is not None:
        raise ApiError(400, "functions: give either tools or functions", param="functions")
    wanted = body.function_call
    choice = NamedTool(type="function", function=wanted) if isinstance(wanted, NamedFunction) else wanted
    tools = [Tool(type="function", function=function) for function in body.functions]
    return body.model_copy(update={"tools": tools, "tool_choice": choice, "parallel_tool_calls": False})


def with_tool_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with tool calls and their results in place of function calls."""
    converted, call_id = [], ""
    for index, message in enumerate(messages):
        if message["role"] == "function":
            converted.append({**message, "role": "tool", "tool_call_id": call_id})
        elif (call := message.get("function_call")) is not None:
            call_id = f"call_{index}"
            others = {name: value for name, value in message.items() if name != "function_call"}
            converted.append({**others, "tool_calls": [{"id": call_id, "type": "function", "function": call}]})
        else:
            converted.append(message)
    return converted


class FunctionCollector(ChatCollector):
    """Collects whole answers, with `function_call` in place of `tool_calls`."""

    def body(self) -> dict[str, Any]:
        body = super().body()
        for choice in body["choices"]:
            choice["finish_reason"] = _finish(choice["finish_reason"])
            if calls := choice["message"].pop("tool_calls", None):
                choice["message"]["function_call"] = calls[0]["function"]
        return body


class FunctionEncoder(ChatEncoder):
    """Writes answers as chunks, with `function_call` in place of `tool_calls`."""

    def _delta(self, delta: Delta) -> bytes:
        if not isinstance(delta, ToolCallDelta):
            return super()._delta(delta)
        name = {} if delta.id is None else {"name": delta.name}
        return orjson.dumps({"function_call": {**name, "arguments": delta.arguments}})

    def _finish(self, answer: ChatAnswer) -> str:
        return _finish(answer.finish)


def _finish(reason: str) -> str:
    return "function_call" if reason == "tool_calls" else reason
