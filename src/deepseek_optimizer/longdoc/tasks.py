"""Tasks on a document (question, summary, extraction by a JSON schema) and their instructions for the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.grammar.json_schema import normalize
from ..engine.request import check_text
from ..errors import RequestError, shown

NOTHING = "NOTHING"  # the model's reply about a chunk that is not relevant to the question
MAX_QUESTION = 8_192  # characters


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        text: of the question.
        before: the preceding conversation, as context for the model; not used for retrieval.

    Raises:
        RequestError: it is empty or longer than MAX_QUESTION characters.
    """

    text: str
    before: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise RequestError("question", "is empty; enter a question")
        check_text("question", self.text)
        if len(self.text) > MAX_QUESTION:
            raise RequestError("question", f"has {len(self.text):,} characters, but the limit is {MAX_QUESTION:,}")

    @property
    def words(self) -> str:
        """Words for retrieval and for ranking citations."""
        return self.text


@dataclass(frozen=True)
class Summary:
    """A summary of the whole document."""

    words = ""


@dataclass(frozen=True)
class Extraction:
    """Data of the document that matches a JSON schema.

    Raises:
        RequestError: the schema is invalid, does not describe an object, or contains what a grammar cannot enforce.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.schema, Mapping) or not isinstance(self.schema.get("properties"), Mapping):
            raise RequestError("schema", 'must be a JSON schema of an object: {"type": "object", "properties": {...}}')
        if self.schema.get("type", "object") != "object":
            kind = shown(self.schema["type"])
            raise RequestError("schema", f"must be of type object, got {kind}; put the value into a property")
        normalize(self.schema)

    @property
    def words(self) -> str:
        """Names of the fields with their descriptions."""
        fields = self.schema["properties"].items()
        described = (f"{name} {field.get('description', '')}" if isinstance(field, Mapping) else name for name, field in fields)
        return " ".join([str(self.schema.get("title", "")), str(self.schema.get("description", "")), *described]).strip()


Task = Question | Summary | Extraction


def instruction(task: Task) -> str:
    """The instruction after the whole document, or after retrieved passages."""
    if isinstance(task, Question):
        return f"Answer the question from the text above, and from nothing else.\n{_question(task)}"
    if isinstance(task, Summary):
        return "Summarize the text above: what it is about, and its main points."
    return f"Extract data from the text above as JSON of this schema:\n{_json(task.schema)}"


def part_instruction(task: Task) -> str:
    """The instruction after one chunk of a document that is processed chunk by chunk."""
    if isinstance(task, Question):
        return (
            "Answer the question from the text above in one or two sentences, and quote the words that matter. If the text "
            f"says nothing about it, answer {NOTHING}.\n{_question(task)}"
        )
    if isinstance(task, Summary):
        return "Summarize the text above in two or three sentences."
    return (
        "Extract what the text above says as JSON of this schema; what it does not say is null, or an empty list:\n"
        f"{_json(task.schema)}"
    )


def merge_instruction(task: Question | Summary) -> str:
    """The instruction after the replies about several chunks, in document order."""
    if isinstance(task, Question):
        return f"Answer the question from the notes above, and from nothing else.\n{_question(task)}"
    return "Put the notes above together into one summary: what they are about, and the main points."


def _question(task: Question) -> str:
    before = f"{task.before.strip()}\n" if task.before.strip() else ""
    return f"{before}Question: {task.text.strip()}"


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
