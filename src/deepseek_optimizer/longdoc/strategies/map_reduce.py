"""Every chunk is asked by itself, many at once, and what they say is merged, in levels where it does not fit one prompt."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from ..citations import cite
from ..extraction import merged, problems, relaxed, without_gaps
from ..material import Material
from ..split import Chunk
from ..tasks import NOTHING, Extraction, Question, Summary, merge_instruction, part_instruction
from ..work import Ask, Batch, Reply, Result, Work
from .replies import cut_notes, json_of, passage, room_for, words_of

PART = 192  # tokens of what one part says at most
_NOTHING = re.compile(rf"[\W_]*{NOTHING}\b", re.IGNORECASE)
_PARTS = {Question: "answers", Summary: "summaries"}


@dataclass(frozen=True)
class Note:
    """What was said of some chunks: `text`, and its tokens as they stand in a prompt."""

    text: str
    ids: list[int]


def map_reduce(task: Question | Summary | Extraction, material: Material, reason: str) -> Work:
    """All chunks in batches, then one answer out of theirs.

    Raises:
        RequestError: a chunk does not fit; a smaller max_length is the remedy.
    """
    if isinstance(task, Extraction):
        return (yield from _extract(task, material, reason))
    spoken = yield from _each(task, material, _part_tokens(material))
    kept: list[tuple[Chunk, str]] = []
    cut = 0
    for chunk, reply in spoken:
        text = material.prompts.answer(reply.text)
        cut += not reply.complete and not reply.repeated
        if text and not (isinstance(task, Question) and _NOTHING.match(text)):
            kept.append((chunk, text))
    notes = [f"{cut} of {len(spoken)} {_PARTS[type(task)]} to parts were cut off"] if cut else []
    if not kept:
        return Result("Nothing in the document answers this.", [], "map_reduce", reason, notes)
    answer = yield from _reduce(task, material, kept, notes)
    shown = [chunk for chunk, _ in kept]
    return Result(answer, cite(answer, shown, material.document, question=task.words), "map_reduce", reason, notes)


def _extract(task: Extraction, material: Material, reason: str) -> Work:
    spoken = yield from _each(task, material, _reply_tokens(material))
    values = [(chunk, json_of(reply)) for chunk, reply in spoken]
    lost = sum(value is None for _, value in values)
    value = without_gaps(merged([{}, *(value for _, value in values)]), task.schema)
    notes = (
        [f"{lost} of {len(values)} replies were cut off, and what they said is lost; allow more with max_tokens"]
        if lost
        else []
    )
    words = words_of(value)
    shown = [chunk for chunk, said in values if said is not None and words_of(said).strip()]
    notes += problems(task.schema, value)
    return Result(value, cite(words, shown, material.document, question=task.words), "map_reduce", reason, notes)


def _each(
    task: Question | Summary | Extraction, material: Material, most: int
) -> Generator[Batch, list[Reply], list[tuple[Chunk, Reply]]]:
    """What the model says of each chunk."""
    words = part_instruction(task)
    room = room_for(material, words, most)
    schema = relaxed(task.schema) if isinstance(task, Extraction) else None
    found: list[tuple[Chunk, Reply]] = []
    chunks = material.chunks
    left = sum(chunk.tokens for chunk in chunks)
    for begin in range(0, len(chunks), material.limits.at_once):
        some = chunks[begin : begin + material.limits.at_once]
        left -= sum(chunk.tokens for chunk in some)
        prompts = [material.prompts.prompt(passage(material, chunk, room), words) for chunk in some]
        replies = yield Batch([Ask(prompt, most, schema) for prompt in prompts], left)
        found += zip(some, replies, strict=True)
    return found


def _reduce(
    task: Question | Summary, material: Material, kept: Sequence[tuple[Chunk, str]], notes: list[str]
) -> Generator[Batch, list[Reply], str]:
    """One text of several: in levels, each with as few prompts as hold what there is."""
    words, most = merge_instruction(task), _reply_tokens(material)
    room = material.limits.room - material.prompts.overhead(words) - most
    level = [_note(material, f"[{material.place(chunk)}] {text}", room) for chunk, text in kept]
    if len(level) == 1:
        return kept[0][1]
    while True:
        groups = _groups(level, room)
        asks = [Ask(material.prompts.prompt([t for note in group for t in note.ids], words), most) for group in groups]
        replies = yield Batch(asks, last=len(asks) == 1)
        texts = [material.prompts.answer(reply.text) for reply in replies]
        if len(texts) == 1:
            notes += cut_notes(replies[0])
            return texts[0]
        level = [_note(material, text, room) for text in texts]


def _note(material: Material, text: str, room: int) -> Note:
    """At most half of the room, so that two notes always become one."""
    return Note(text, material.prompts.encode(f"{text}\n\n")[: room // 2])


def _groups(notes: list[Note], room: int) -> list[list[Note]]:
    """Runs of notes that fit a prompt; two at least, but for the last."""
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
    """A quarter of the room at most, so that what is merged has the rest."""
    return max(1, min(material.limits.reply, material.limits.room // 4))
