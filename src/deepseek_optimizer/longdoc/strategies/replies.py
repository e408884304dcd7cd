"""What strategies share: a reply as an answer to its task, and the room that prompts have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import RequestError
from ..extraction import problems
from ..material import Material
from ..split import Chunk
from ..tasks import Extraction, Task
from ..work import Reply

PLACE = 64  # tokens that a passage's place may take beside its own


def schema_of(task: Task) -> Mapping[str, Any] | None:
    """What a reply must keep to."""
    return task.schema if isinstance(task, Extraction) else None


def value_of(task: Task, material: Material, reply: Reply) -> tuple[Any, str, list[str]]:
    """A reply as the answer, as text for citations, and what there is to note."""
    notes = cut_notes(reply)
    if not isinstance(task, Extraction):
        text = material.prompts.answer(reply.text)
        return text, text, notes
    value = json_of(reply)
    if value is None:
        return None, "", notes or ["the reply is not JSON"]
    return value, words_of(value), notes + problems(task.schema, value)


def cut_notes(reply: Reply) -> list[str]:
    """What there is to note about how a reply ended."""
    if reply.repeated:
        return ["the answer began to repeat itself, and was ended there"]
    return [] if reply.complete else [f"the answer was cut off after {reply.generated} tokens; allow more with max_tokens"]


def json_of(reply: Reply) -> Any:
    """The JSON value of a reply; None where it was cut off."""
    try:
        return json.loads(reply.text)
    except ValueError:
        return None


def words_of(value: Any) -> str:
    """The texts and numbers in a JSON value, a line each."""
    if isinstance(value, dict):
        return "\n".join(words_of(item) for item in value.values())
    if isinstance(value, list):
        return "\n".join(words_of(item) for item in value)
    return "" if value is None or isinstance(value, bool) else str(value)


def room_for(material: Material, instruction: str, reply: int) -> int:
    """Tokens of text that a prompt can hold beside the instruction and a reply, for all chunks to fit.

    Raises:
        RequestError: the longest chunk does not.
    """
    limits = material.limits
    room = limits.room - material.prompts.overhead(instruction) - reply
    longest = max((chunk.tokens for chunk in material.chunks), default=0)
    if longest + PLACE > room:
        raise RequestError(
            "max_length",
            f"chunks of up to {longest} tokens do not fit: of the {limits.room} that the model's context and cache have, the "
            f"task and a reply of {reply} leave {max(room, 0)}. Take max_length={max(room - PLACE, 0)} or less, more memory, "
            "or a model with a longer context",
        )
    return room


def passage(material: Material, chunk: Chunk, most: int) -> list[int]:
    """A chunk's tokens with its place before them, or without where that is more than `most`."""
    text = material.text(chunk)
    ids = material.prompts.encode(f"[{material.place(chunk)}]\n{text}\n\n")
    return ids if len(ids) <= most else material.prompts.encode(text)[:most]
