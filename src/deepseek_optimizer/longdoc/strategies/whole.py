"""The whole document in one prompt: exact, and the next question about it has to process only itself."""

from __future__ import annotations

from ..citations import cite
from ..material import Material
from ..strategy_protocol import Ask, Batch, Result, Work
from ..tasks import Task, instruction
from .replies import schema_of, value_of


def fits(task: Task, material: Material) -> bool:
    """Whether the whole document, the task and a reply fit. Tokens are counted exactly only if it may be close."""
    limits = material.limits
    left = limits.room - material.prompts.overhead(instruction(task)) - limits.reply
    return material.tokens <= 1.1 * left and len(material.ids) <= left


def whole(task: Task, material: Material, reason: str) -> Work:
    """One prompt: the document first, the task last."""
    prompt = material.prompts.prompt(material.ids, instruction(task))
    [reply] = yield Batch([Ask(prompt, material.limits.reply, schema_of(task))], last=True)
    answer, text, notes = value_of(task, material, reply)
    return Result(answer, cite(text, material.chunks, material.document, question=task.words), "whole", reason, notes)
