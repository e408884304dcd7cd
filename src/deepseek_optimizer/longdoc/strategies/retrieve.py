"""Answers from the chunks that contain the question's words: BM25 finds them, and the prompt has them in document order."""

from __future__ import annotations

from ..citations import cite
from ..material import Material
from ..split import Chunk
from ..strategy_protocol import Ask, Batch, Result, Work
from ..tasks import Task, instruction
from .replies import passage, room_for, schema_of, value_of


def matching_chunks(task: Task, material: Material) -> list[Chunk]:
    """The chunks that contain words of the question, best first; at most `limits.top`."""
    return [material.chunks[index] for index, _ in material.index.search(task.words, material.limits.top)]


def retrieve(task: Task, material: Material, reason: str) -> Work:
    """One prompt with the best chunks that fit.

    Raises:
        RequestError: not even one chunk fits; use a smaller max_length.
    """
    room = room_for(material, instruction(task), material.limits.reply)
    shown: list[tuple[Chunk, list[int]]] = []
    for chunk in matching_chunks(task, material):
        ids = passage(material, chunk, room if not shown else material.limits.room)
        if len(ids) <= room:
            shown.append((chunk, ids))
            room -= len(ids)
    in_order = sorted(shown, key=lambda pair: pair[0].index)
    prompt = material.prompts.prompt([token for _, ids in in_order for token in ids], instruction(task))
    [reply] = yield Batch([Ask(prompt, material.limits.reply, schema_of(task))], last=True)
    answer, text, notes = value_of(task, material, reply)
    best_first = [chunk for chunk, _ in shown]
    return Result(answer, cite(text, best_first, material.document, question=task.words), "retrieve", reason, notes)
