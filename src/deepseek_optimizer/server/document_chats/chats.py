"""Chats with files: made ready, and set up as any chat where all of it fits one prompt."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from ...chat.reasoning import ReasoningParser
from ...engine.request import Request as EngineRequest
from ...longdoc.material import Material
from ..chat.chat_answers import ChatAnswer
from ..chat.chat_setup import ChatSetup, ChatSpec, set_up
from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState
from .answers import CitedAnswers, DocumentAnswers
from .attachments import Attached, attached, has_files


@dataclass(frozen=True)
class Documents:
    """A chat's."""

    attached: Attached
    material: Material


def submit_answers(
    state: ServerState, documents: Documents | None, setup: ChatSetup | None, requests: list[EngineRequest], one_call: bool
) -> tuple[list[Any], list[ChatAnswer]]:
    """Answers of the engine, and what reads them.

    Args:
        setup: None: the documents do not fit one prompt; then there is one request, whose prompt does not count.

    Raises:
        RequestError, EngineDeadError: of the first request that is not taken.
    """
    if setup is None:
        assert documents is not None
        parsed = [ChatAnswer(ReasoningParser())]
        return [DocumentAnswers(state, documents.attached, documents.material, requests[0], parsed[0])], parsed
    answers = state.submit(requests)
    parsed = [ChatAnswer(setup.parser() if setup.parser else None, one_call) for _ in requests]
    if documents is None:
        return answers, parsed
    attached, material = documents.attached, documents.material
    cited = [
        CitedAnswers(state, one, answer, setup.parser() if setup.parser else None, attached, material)
        for one, answer in zip(answers, parsed, strict=True)
    ]
    return cited, parsed


async def documents_of(state: ServerState, owner: str, chat: ChatSpec, places: ExitStack, caller: Caller) -> Documents | None:
    """The documents of a chat, read and in chunks; None: it has no files.

    Args:
        owner: salt of the key that asks.
        places: the request's, given back when it is answered: memory of files that came with it goes along.

    Raises:
        ApiError, DocumentError, WorkerLostError: as of `attached`; 504, they were not ready by the deadline.
    """
    if not has_files(chat.messages):
        return None
    found = await attached(state, chat.messages, owner, places, caller)
    return Documents(found, await state.documents.material(owner, found.digests, found.document, caller))


async def set_up_chat(
    state: ServerState, chat: ChatSpec, documents: Documents | None, most: int | None, caller: Caller
) -> ChatSetup | None:
    """As `set_up`, with the documents' texts before what is asked of them; None: they do not fit.

    Args:
        most: tokens that the request allows the answer; None: it does not say.

    Raises: as `set_up`; RequestError: what people say can't fit; ApiError: as of `FairQueue.run`.
    """
    if documents is None:
        state.prompt_size.check_chat(chat.messages)
        return await state.tokenizing(lambda lane: set_up(state, lane, chat), caller)
    room = state.engine.room
    if documents.material.tokens > room:
        return None
    asked = replace(chat, messages=documents.attached.messages)
    size = caller.size + documents.attached.document.characters
    setup = await state.tokenizing(lambda lane: set_up(state, lane, asked), caller, size)
    fits = not setup.dropped and len(setup.prompt.ids) + (most or state.documents.reply) <= room
    return setup if fits else None


def check_simple(**wanted: object) -> None:
    """For documents that do not fit one prompt.

    Raises:
        ApiError: 400, a field by name that asks for what only one prompt can give.
    """
    for name, value in wanted.items():
        if value:
            raise ApiError(
                400, f"{name}: not with documents that, with the answer, are longer than the model's context; leave it out, or "
                "send less text", param=name,
            )  # fmt: skip
