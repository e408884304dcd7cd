"""The whole document through a sliding window of bounded memory: the task first, where it is kept, and again at the end.

Tokens that the window has dropped cannot contribute to the answer (Xiao et al. 2023, StreamingLLM: the model stays fluent but
does not remember). So this suits documents whose end matters, such as logs; the other strategies read all chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..citations import cite
from ..material import Material
from ..split import Chunk
from ..strategy_protocol import Ask, Batch, Result, Work
from ..tasks import Task, instruction
from .replies import schema_of, value_of


def window(task: Task, material: Material, reason: str) -> Work:
    """One prompt as long as the document."""
    before, after = material.prompts.around(instruction(task), ahead=instruction(task))
    prompt = [*before, *material.ids, *after]
    ask = Ask(prompt, material.limits.reply, schema_of(task), ((0, len(before)),), window=True)
    [reply] = yield Batch([ask], last=True)
    answer, text, notes = value_of(task, material, reply)
    seen = _seen(material, reply.dropped)
    return Result(answer, cite(text, seen, material.document, question=task.words), "window", reason, notes)


def _seen(material: Material, dropped: int) -> Sequence[Chunk]:
    """Chunks that are still at least partly in the window at the end: the oldest tokens are dropped first."""
    begun, chunks = 0.0, material.chunks
    for number, chunk in enumerate(chunks):
        following = chunks[number + 1] if number + 1 < len(chunks) else None
        shared = max(0, chunk.end - following.start) if following is not None and following.file == chunk.file else 0
        begun += chunk.tokens * (1 - shared / max(1, chunk.end - chunk.start))
        if begun > dropped:
            return chunks[number:]
    return chunks[-1:]
