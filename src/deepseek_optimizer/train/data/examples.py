"""Conversion of records to examples: a chat, a prompt with its completion, or a text. Every field is validated.

| fields of a record | example |
|---|---|
| `messages` (`tools`) | a chat in OpenAI's format |
| `conversations` (`system`, `tools`) | a chat in ShareGPT's format: `from` and `value`; or `role` and `content` |
| `prompt`, `completion` | strings: a question and its answer; lists of messages: a chat |
| `instruction`, `output` (`input`, `system`) | a question and its answer in Alpaca's format |
| `text` | a text |

Other fields (`id`, `source`) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...chat.messages import check_messages, check_tools
from ...chat.tools.base import encodable
from ...errors import RequestError
from .places import Place
from .records import Record

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
_FORMS = "messages; conversations; prompt and completion; instruction and output; or text"


@dataclass(frozen=True)
class Chat:
    """A chat: messages validated by `chat.messages.check_messages`, and tools by `check_tools`; None: no tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True)
class PromptAndAnswer:
    """A question and its answer.

    Attributes:
        prompt: the question.
        completion: the answer.
        system: the system prompt, if any.
        plain: the text to put before the completion if there is no chat template.
    """

    prompt: str
    completion: str
    system: str | None
    plain: str

    def chat(self) -> Chat:
        """The question and its answer as a chat."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}]
        return Chat([*system, *turns], None)


@dataclass(frozen=True)
class PlainText:
    """A text. `cut`: it may be split anywhere, as text files are."""

    text: str
    cut: bool


Example = Chat | PromptAndAnswer | PlainText


def to_example(record: Record) -> Example:
    """Converts a record to an example.

    Raises:
        DataError: the record has none of the supported forms, or a field is invalid.
    """
    place, value = record
    if isinstance(value, str):
        return PlainText(value, cut=True)
    if "messages" in value:
        return _chat(value["messages"], value.get("tools"), place, "messages")
    if "conversations" in value:
        turns = _sharegpt(value["conversations"], place)
        return _chat(_with_system(value, turns, place), value.get("tools"), place, "conversations")
    if "prompt" in value and "completion" in value:
        return _prompt_and_completion(value, place)
    if "instruction" in value and "output" in value:
        return _instruction(value, place)
    if "text" in value:
        return PlainText(_string(value, "text", place), cut=False)
    fields = ", ".join(map(str, value)) or "no fields"
    raise place.error(f"has none of the supported forms ({_FORMS}); it has {fields[:200]}")


def _chat(messages: Any, tools: Any, place: Place, field: str) -> Chat:
    try:
        checked = check_messages(messages)
        checked_tools = check_tools(_parsed(tools)) if tools else None
    except RequestError as error:
        where = error.field.replace("messages", field, 1) if field != "messages" else error.field
        raise place.error(str(error).removeprefix(f"{error.field}: "), where) from None
    for i, message in enumerate(checked):
        content = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip()
        if not content and message["role"] != "tool":  # a tool may return nothing
            raise place.error("is empty", f"{field}[{i}].content")
    return Chat(checked, checked_tools)


def _parsed(tools: Any) -> Any:
    """Parses tools, which some data sets store as JSON text."""
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except (ValueError, RecursionError):
        raise RequestError("tools", "must be a list of tools") from None


def _sharegpt(turns: Any, place: Place) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise place.error("must be a list of at least one turn", "conversations")
    return [_turn(turn, place, f"conversations[{i}]") for i, turn in enumerate(turns)]


def _turn(turn: Any, place: Place, where: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn  # a message already; `check_messages` validates it
    speaker, value = turn["from"], turn.get("value")
    role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise place.error(f"must be one of {', '.join(_SHAREGPT)}, got {speaker!r}", f"{where}.from")
    if not isinstance(value, str):
        raise place.error(f"must be a string, got {type(value).__name__}", f"{where}.value")
    if speaker != "function_call":
        return {"role": role, "content": value}
    try:
        call = json.loads(value)
        return {"role": role, "tool_calls": [{"function": {"name": call["name"], "arguments": call["arguments"]}}]}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise place.error('must be JSON text like {"name": ..., "arguments": {...}}', f"{where}.value") from None


def _with_system(value: Mapping[str, Any], turns: list[Any], place: Place) -> list[Any]:
    system = _optional(value, "system", place)
    first = turns[0].get("role") if isinstance(turns[0], Mapping) else None
    return turns if system is None or first == "system" else [{"role": "system", "content": system}, *turns]


def _prompt_and_completion(value: Mapping[str, Any], place: Place) -> Example:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat([*prompt, *completion], value.get("tools"), place, "prompt+completion")
    texts = _string(value, "prompt", place), _string(value, "completion", place)
    return PromptAndAnswer(*texts, system=_optional(value, "system", place), plain=texts[0])


def _instruction(value: Mapping[str, Any], place: Place) -> PromptAndAnswer:
    parts = [_string(value, "instruction", place), _optional(value, "input", place)]
    question = "\n\n".join(part for part in parts if part)
    system = _optional(value, "system", place)
    plain = f"{system}\n\n{question}\n\n" if system else f"{question}\n\n"
    return PromptAndAnswer(question, _string(value, "output", place), system, plain)


def _string(value: Mapping[str, Any], name: str, place: Place) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise place.error(f"must be a string, got {type(text).__name__}", name)
    if not text.strip():
        raise place.error("is empty", name)
    if not encodable(text):
        raise place.error("has half of a surrogate pair, which is not a character; remove it", name)
    return text


def _optional(value: Mapping[str, Any], name: str, place: Place) -> str | None:
    """A string that may be missing or empty."""
    if value.get(name) in (None, ""):
        return None
    return _string(value, name, place) if not isinstance(value[name], str) or value[name].strip() else None
