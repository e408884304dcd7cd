"""Chats with files: made ready, and set up as any chat where all of it fits one prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from ..chat.reasoning import ReasoningParser
from ..engine.request import Request as EngineRequest
from ..longdoc.material import Material
from .attachments import Attached, attached, has_files
from .chat_answers import ChatAnswer
from .chat_setup import ChatAsked, ChatSetup, set_up
from .document_answers import CitedAnswers, DocumentAnswers
from .problems import ApiError
from .state import ServerState

T = TypeVar("T")


@dataclass(frozen=True)
class Documents:
    """A chat's."""

    attached: Attached
    material: Material


def answered(
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


async def documents_of(
    state: ServerState, request: Request, chat: ChatAsked, places: ExitStack, deadline: float
) -> Documents | None:
    """The documents of a chat, read and in chunks; None: it has no files.

    Args:
        places: the request's, given back when it is answered: memory of files that came with it goes along.

    Raises:
        ApiError, DocumentError: as of `attached`; 504, they were not ready by the deadline.
        ClientDisconnect: the client left meanwhile.
    """
    if not has_files(chat.messages):
        return None
    owner = request.state.salt

    async def ready() -> Documents:
        found = await attached(state, chat.messages, owner, places, deadline)
        return Documents(found, await state.documents.material(owner, found.digests, found.document, deadline))

    return await _unless_gone(request, ready())


async def set_up_chat(
    state: ServerState, chat: ChatAsked, documents: Documents | None, most: int | None, deadline: float
) -> ChatSetup | None:
    """As `set_up`, with the documents' texts before what is asked of them; None: they do not fit.

    Args:
        most: tokens that the request allows the answer; None: it does not say.

    Raises: as `set_up`; ApiError: 504, not done by the deadline.
    """
    if documents is None:
        return await state.tokenizing(lambda: set_up(state, chat), deadline)
    room = state.engine.room
    if documents.material.tokens > room:
        return None
    asked = replace(chat, messages=documents.attached.messages)
    setup = await state.tokenizing(lambda: set_up(state, asked), deadline)
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


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work comes to, which is ended when the client leaves."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        watch.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
