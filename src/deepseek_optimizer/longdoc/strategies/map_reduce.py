"""Asks about each chunk separately, many in a batch, and merges the replies, in several levels if they exceed one prompt."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from ..citations import cite
from ..extraction import merged, problems, relaxed, without_gaps
from ..material import Material
from ..split import Chunk
from ..strategy_protocol import Ask, Batch, Reply, Result, Work
from ..tasks import NOTHING, Extraction, Question, Summary, merge_instruction, part_instruction
from .replies import cut_notes, json_of, passage, room_for, words_of

PART = 192  # maximum tokens of the reply about one chunk
_NOTHING = re.compile(rf"[\W_]*{NOTHING}\b", re.IGNORECASE)
_PARTS = {Question: "answers", Summary: "summaries"}


@dataclass(frozen=True)
class Note:
    """A reply about one or several chunks: `text`, and its token ids in a prompt."""

    text: str
    ids: list[int]


def map_reduce(task: Question | Summary | Extraction, material: Material, reason: str) -> Work:
    """Asks about all chunks in batches, then merges the replies into one answer.

    Raises:
        RequestError: a chunk does not fit; use a smaller max_length.
    """
    if isinstance(task, Extraction):
        return (yield from _extract(task, material, reason))
    replies = yield from _each(task, material, _part_tokens(material))
    relevant: list[tuple[Chunk, str]] = []
    cut = 0
    for chunk, reply in replies:
        text = material.prompts.answer(reply.text)
        cut += not reply.complete and not reply.repeated
        if text and not (isinstance(task, Question) and _NOTHING.match(text)):
            relevant.append((chunk, text))
    notes = [f"{cut} of {len(replies)} {_PARTS[type(task)]} of chunks were cut off"] if cut else []
    if not relevant:
        return Result("Nothing in the document answers this.", [], "map_reduce", reason, notes)
    answer = yield from _reduce(task, material, relevant, notes)
    shown = [chunk for chunk, _ in relevant]
    return Result(answer, cite(answer, shown, material.document, question=task.words), "map_reduce", reason, notes)


def _extract(task: Extraction, material: Material, reason: str) -> Work:
    replies = yield from _each(task, material, _reply_tokens(material))
    values = [(chunk, json_of(reply)) for chunk, reply in replies]
    lost = sum(value is None for _, value in values)
    value = without_gaps(merged([{}, *(value for _, value in values)]), task.schema)
    notes = [f"{lost} of {len(values)} replies were cut off and their data is lost; increase max_tokens"] if lost else []
    words = words_of(value)
    shown = [chunk for chunk, data in values if data is not None and words_of(data).strip()]
    notes += problems(task.schema, value)
    return Result(value, cite(words, shown, material.document, question=task.words), "map_reduce", reason, notes)


def _each(
    task: Question | Summary | Extraction, material: Material, max_tokens: int
) -> Generator[Batch, list[Reply], list[tuple[Chunk, Reply]]]:
    """The model's reply about each chunk."""
    words = part_instruction(task)
    room = room_for(material, words, max_tokens)
    schema = relaxed(task.schema) if isinstance(task, Extraction) else None
    results: list[tuple[Chunk, Reply]] = []
    chunks = material.chunks
    left = sum(chunk.tokens for chunk in chunks)
    for begin in range(0, len(chunks), material.limits.at_once):
        batch = chunks[begin : begin + material.limits.at_once]
        left -= sum(chunk.tokens for chunk in batch)
        prompts = [material.prompts.prompt(passage(material, chunk, room), words) for chunk in batch]
        replies = yield Batch([Ask(prompt, max_tokens, schema) for prompt in prompts], left)
        results += zip(batch, replies, strict=True)
    return results


def _reduce(
    task: Question | Summary, material: Material, relevant: Sequence[tuple[Chunk, str]], notes: list[str]
) -> Generator[Batch, list[Reply], str]:
    """Merges several texts into one, in levels, each with as few prompts as possible."""
    words, max_tokens = merge_instruction(task), _reply_tokens(material)
    room = material.limits.room - material.prompts.overhead(words) - max_tokens
    level = [_note(material, f"[{material.place(chunk)}] {text}", room) for chunk, text in relevant]
    if len(level) == 1:
        return relevant[0][1]
    while True:
        groups = _groups(level, room)
        asks = [Ask(material.prompts.prompt([t for note in group for t in note.ids], words), max_tokens) for group in groups]
        replies = yield Batch(asks, last=len(asks) == 1)
        texts = [material.prompts.answer(reply.text) for reply in replies]
        if len(texts) == 1:
            notes += cut_notes(replies[0])
            return texts[0]
        level = [_note(material, text, room) for text in texts]


def _note(material: Material, text: str, room: int) -> Note:
    """A note of at most half of the room, so that two notes always fit into one prompt."""
    return Note(text, material.prompts.encode(f"{text}\n\n")[: room // 2])


def _groups(notes: list[Note], room: int) -> list[list[Note]]:
    """Groups of consecutive notes that fit into a prompt: at least two each, except in the last."""
    groups: list[list[Note]] = []
    used = room + 1
    for note in notes:
        if used + len(note.ids) > room:
            groups.append([])
            used = 0
        groups[-1].append(note)
        used += len(note.ids)
    return groups


def _part_tokens(material: Material) -> int:
    return min(PART, _reply_tokens(material))


def _reply_tokens(material: Material) -> int:
    """At most a quarter of the room, so that the notes to merge have the rest."""
    return max(1, min(material.limits.reply, material.limits.room // 4))
