"""Validates messages and tools from clients, and normalizes them to the form that chat templates expect.

Content becomes a string, `developer` becomes `system`, the arguments of past calls become objects. Fields that no template uses
are dropped. Nothing is ever downloaded: pictures are given besides the messages, and for models that read text are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .tools.base import encodable, read_json

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES, MAX_TOOLS, MAX_DEPTH = 10_000, 256, 64
TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning")


def check_messages(messages: Any, pictures: bool = False) -> list[dict[str, Any]]:
    """The messages in the form that templates expect: new objects of plain strings, lists and dicts.

    Args:
        messages: the messages.
        pictures: whether content may have parts {"type": "image"}, the places of pictures that are given besides. Content with
            such parts stays a list.

    Raises:
        RequestError: a message is invalid; names the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages", "must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise RequestError("messages", f"must have at most {MAX_MESSAGES:,} messages, got {len(messages):,}")
    return [_message(message, f"messages[{i}]", pictures) for i, message in enumerate(messages)]


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools in the form that templates expect.

    Raises:
        RequestError: a tool is invalid; names the field.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise RequestError("tools", "must be a list of tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError("tools", f"must have at most {MAX_TOOLS} tools, got {len(tools)}")
    checked = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise RequestError("tools", "two tools have the same name")
    return checked


def check_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a JSON value. Raises RequestError if it cannot be encoded or is nested more than MAX_DEPTH levels deep."""
    if depth > MAX_DEPTH:
        raise RequestError(where, f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return _string(value, where)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_string(key, where): check_json(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_json(item, where, depth + 1) for item in value]
    raise RequestError(where, f"must be JSON, got {type(value).__name__}")


def _message(message: Any, where: str, pictures: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(where, "must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    out: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        out["content"] = ""
    else:
        out["content"] = _content(content, f"{where}.content", pictures)
    if role == "assistant":
        for field in _REASONING:
            if message.get(field) is not None:
                out["reasoning_content"] = _string(message[field], f"{where}.{field}")
                break
        if calls:
            out["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    elif calls:
        raise RequestError(f"{where}.tool_calls", "is allowed only in assistant messages")
    if role == "tool" and message.get("tool_call_id") is not None:
        out["tool_call_id"] = _string(message["tool_call_id"], f"{where}.tool_call_id")
    if message.get("name") is not None:
        out["name"] = _name(message["name"], f"{where}.name")
    return out


def _content(content: Any, where: str, pictures: bool) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return _string(content, where)
    if not isinstance(content, Sequence):
        raise RequestError(where, "must be a string or a list of text parts")
    texts: list[str | None] = []  # None: a picture
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if pictures and kind == "image":
            texts.append(None)
            continue
        if kind not in _TEXT_PARTS:
            raise RequestError(f"{where}[{i}]", "must be a part of type text: images, audio and files are not accepted here")
        texts.append(_string(part.get("text"), f"{where}[{i}].text"))
    if None in texts:
        return [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
    return "\n".join(text or "" for text in texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)) or len(calls) > MAX_TOOLS:
        raise RequestError(where, f"must be a list of at most {MAX_TOOLS} calls")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}[{i}]", "must be a function call")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            arguments = read_json(arguments.strip() or "{}")
        if not isinstance(arguments, Mapping):
            raise RequestError(f"{where}[{i}].function.arguments", "must be the text of a JSON object")
        checked = {
            "type": "function",
            "function": {
                "name": _name(function.get("name"), f"{where}[{i}].function.name"),
                "arguments": check_json(arguments, f"{where}[{i}].function.arguments"),
            },
        }
        if call.get("id") is not None:
            checked["id"] = _string(call["id"], f"{where}[{i}].id")
        out.append(checked)
    return out


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(where, 'must be {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    out: dict[str, Any] = {"name": _name(function.get("name"), f"{where}.function.name")}
    if function.get("description") is not None:
        out["description"] = _string(function["description"], f"{where}.function.description")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"{where}.function.parameters", "must be a JSON schema")
    out["parameters"] = check_json(parameters, f"{where}.function.parameters")
    return {"type": "function", "function": out}


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise RequestError(where, "must be 1 to 64 letters, digits, or any of _ . : -")
    return name


def _string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RequestError(where, "must be a string")
    if not encodable(text):
        raise RequestError(where, "contains half of a surrogate pair, which is not a valid character")
    return text
