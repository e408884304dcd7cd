"""Shared by strategies: turning a reply into an answer, and the space available in prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import RequestError
from ..extraction import problems
from ..material import Material
from ..split import Chunk
from ..strategy_protocol import Reply
from ..tasks import Extraction, Task

PLACE = 64  # maximum tokens of the place in front of a passage


def schema_of(task: Task) -> Mapping[str, Any] | None:
    """The JSON schema that a reply must match, if any."""
    return task.schema if isinstance(task, Extraction) else None


def value_of(task: Task, material: Material, reply: Reply) -> tuple[Any, str, list[str]]:
    """A reply as the answer, as text for citations, and notes."""
    notes = cut_notes(reply)
    if not isinstance(task, Extraction):
        text = material.prompts.answer(reply.text)
        return text, text, notes
    value = json_of(reply)
    if value is None:
        return None, "", notes or ["the reply is not JSON"]
    return value, words_of(value), notes + problems(task.schema, value)


def cut_notes(reply: Reply) -> list[str]:
    """Notes about how a reply ended."""
    if reply.repeated:
        return ["the answer started to repeat itself and was stopped there"]
    return [] if reply.complete else [f"the answer was cut off after {reply.generated} tokens; increase max_tokens"]


def json_of(reply: Reply) -> Any:
    """The JSON value of a reply; None if it was cut off."""
    try:
        return json.loads(reply.text)
    except ValueError:
        return None


def words_of(value: Any) -> str:
    """The strings and numbers in a JSON value, one per line."""
    if isinstance(value, dict):
        return "\n".join(words_of(item) for item in value.values())
    if isinstance(value, list):
        return "\n".join(words_of(item) for item in value)
    return "" if value is None or isinstance(value, bool) else str(value)


def room_for(material: Material, instruction: str, reply: int) -> int:
    """Tokens of text that fit into a prompt besides the instruction and a reply.

    Raises:
        RequestError: the longest chunk does not fit.
    """
    limits = material.limits
    room = limits.room - material.prompts.overhead(instruction) - reply
    longest = max((chunk.tokens for chunk in material.chunks), default=0)
    if longest + PLACE > room:
        raise RequestError(
            "max_length",
            f"chunks of up to {longest} tokens do not fit: of the {limits.room} tokens of the model's context and cache, "
            "the task "
            f"and a reply of {reply} leave {max(room, 0)}. Use max_length={max(room - PLACE, 0)} or less, more memory, or a "
            "model with a longer context",
        )
    return room


def passage(material: Material, chunk: Chunk, max_tokens: int) -> list[int]:
    """A chunk's tokens, preceded by its place unless that exceeds `max_tokens`."""
    text = material.text(chunk)
    ids = material.prompts.encode(f"[{material.place(chunk)}]\n{text}\n\n")
    return ids if len(ids) <= max_tokens else material.prompts.encode(text)[:max_tokens]
