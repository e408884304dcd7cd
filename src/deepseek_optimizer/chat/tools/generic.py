"""Tools for a model whose chat template has none: they are described in the system message, calls are part of the assistant's
text, and results are user messages. By default calls are written as in Hermes, which many models have seen in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...engine.grammar.calls import CallShape, Parts
from .base import write_json
from .hermes import HERMES

GENERIC = replace(HERMES, name="generic")
_EXAMPLE = "example_tool", {"example_parameter": "value"}


def with_described_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], shape: CallShape, *, system: bool
) -> list[dict[str, Any]]:
    """The messages of a chat with tools for a template without tools.

    Args:
        messages, tools: as `check_messages` and `check_tools` return them.
        shape: how calls are written.
        system: whether the template supports system messages; otherwise the description begins the first user message.

    Returns: messages of the roles system, user and assistant. The results of the calls of one turn are one user message,
        together with the user message that follows, since many templates require turns to alternate.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role == "tool":
            _say(out, f"<tool_response>\n{message['content']}\n</tool_response>")
        elif role == "assistant" and message.get("tool_calls"):
            calls = written(message["tool_calls"], shape)
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            out.append({**rest, "content": "\n".join(part for part in (message["content"], calls) if part)})
        elif role == "user" and out and out[-1].get("results"):
            _say(out, message["content"])
        else:
            out.append(dict(message))
    for message in out:
        message.pop("results", None)
    described = description(tools, shape)
    if out[0]["role"] == "system":
        first = out.pop(0)
        described = f"{first['content']}\n\n{described}" if first["content"] else described
        if system:
            return [{**first, "content": described}, *out]
    if system:
        return [{"role": "system", "content": described}, *out]
    for message in out:
        if message["role"] == "user":
            message["content"] = f"{described}\n\n{message['content']}"
            return out
    return [{"role": "user", "content": described}, *out]


def description(tools: Sequence[Mapping[str, Any]], shape: CallShape) -> str:
    """Explains tools and the syntax of calls to a model."""
    listed = "\n".join(write_json(tool["function"]) for tool in tools)
    name, arguments = _EXAMPLE
    example = written([{"function": {"name": name, "arguments": arguments}}], shape)
    return (
        "# Tools\n\nYou can call these tools, which are described by JSON schemas:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        f"To call a tool, answer with its name and its arguments in exactly this form:\n{example}\n\n"
        "You then receive the result in <tool_response></tool_response>. Call a tool only if it helps to answer; otherwise "
        "answer directly."
    )


def written(calls: Sequence[Mapping[str, Any]], shape: CallShape) -> str:
    """The text of calls in a shape."""
    return shape.begin + shape.separator.join(_call(call["function"], shape) for call in calls) + shape.end


def _call(function: Mapping[str, Any], shape: CallShape) -> str:
    arguments = function["arguments"]
    if shape.parameters is None:
        text = write_json(arguments)
    else:
        each = []
        for name, value in arguments.items():
            is_text = isinstance(value, str)
            between = shape.parameters.between
            if not is_text and shape.parameters.json_between is not None:
                between = shape.parameters.json_between
            shown = value if is_text else write_json(value)
            each.append(f"{_text(shape.parameters.before)}{name}{_text(between)}{shown}{shape.parameters.after}")
        text = "".join(each)
    return f"{_text(shape.before)}{function['name']}{_text(shape.between)}{text}{_text(shape.after)}"


def _text(parts: Parts) -> str:
    return parts if isinstance(parts, str) else "".join(part if isinstance(part, str) else part.example for part in parts)


def _say(out: list[dict[str, Any]], text: str) -> None:
    """Adds a tool result, or what the user says after results, to the user message of these results."""
    if out and out[-1].get("results"):
        out[-1]["content"] += f"\n{text}"
    else:
        out.append({"role": "user", "content": text, "results": True})
