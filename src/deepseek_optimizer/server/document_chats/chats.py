"""Chats with files: one prompt, as in any chat, if everything fits, or otherwise a strategy for long documents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ...chat.reasoning import ReasoningParser
from ...engine.request import CompiledGrammar
from ...engine.request import Request as EngineRequest
from ...longdoc.material import Material
from ..chat.chat_answers import ChatAnswer
from ..chat.chat_setup import ChatSetup, ChatSpec, set_up
from ..chat.forms import Form
from ..chat.pictures import prepare_chat_with_pictures
from ..chat.prepared import PreparedChat, prepare_chat
from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState
from .answers import CitedAnswers, DocumentAnswers
from .attachments import Attached, attached


class CitedChat(PreparedChat):
    """A chat whose prompt contains its files; its answers get citations."""

    def __init__(self, state: ServerState, chat: ChatSpec, setup: ChatSetup, files: Attached, material: Material) -> None:
        super().__init__(state, chat, setup)
        self._files, self._material = files, material

    def submit(
        self, requests: list[EngineRequest], one_call: bool, start: Callable[[list[EngineRequest]], list[Any]] | None = None
    ) -> tuple[list[Any], list[ChatAnswer]]:
        """As `PreparedChat.submit`."""
        answers, parsed = super().submit(requests, one_call, start)
        cited = [
            CitedAnswers(self.state, one, answer, self.parser(), self._files, self._material)
            for one, answer in zip(answers, parsed, strict=True)
        ]
        return cited, parsed


class LongChat(PreparedChat):
    """A chat whose files do not fit into one prompt. `submit` takes one request, whose prompt is not used."""

    def __init__(self, state: ServerState, chat: ChatSpec, files: Attached, material: Material) -> None:
        super().__init__(state, chat, None)
        self._files, self._material = files, material

    def check_fields(self, **wanted: object) -> None:
        """As `PreparedChat.check_fields`: refuses every field whose value is true."""
        for name, value in wanted.items():
            if value:
                raise ApiError(
                    400,
                    f"{name}: not supported with documents that exceed the model's context together with the answer; leave it "
                    "out, or send less text",
                    param=name,
                )

    async def grammar(self, form: Form | None, parallel: bool, caller: Caller) -> CompiledGrammar | None:
        """None: `check_fields` refuses requests that need a grammar."""
        return None

    def submit(
        self, requests: list[EngineRequest], one_call: bool, start: Callable[[list[EngineRequest]], list[Any]] | None = None
    ) -> tuple[list[Any], list[ChatAnswer]]:
        """As `PreparedChat.submit`, but `check_fields` refuses what needs `start`."""
        (request,) = requests
        parsed = ChatAnswer(ReasoningParser())
        return [DocumentAnswers(self.state, self._files, self._material, request, parsed)], [parsed]


async def prepare_any_chat(
    state: ServerState, chat: ChatSpec, max_tokens: int | None, owner: str, places: ExitStack, caller: Caller
) -> PreparedChat:
    """Renders the prompt of a chat, which may have pictures or files. Arguments as those of `prepare_chat_with_files`.

    Raises:
        ApiError, DocumentError, RequestError, WorkerLostError, EngineBusyError: see `prepare_chat`,
            `prepare_chat_with_pictures` and `prepare_chat_with_files`.
    """
    if chat.has_pictures:
        return await prepare_chat_with_pictures(state, chat, owner, caller)
    if chat.has_files:
        return await prepare_chat_with_files(state, chat, max_tokens, owner, places, caller)
    return await prepare_chat(state, chat, caller)


async def prepare_chat_with_files(
    state: ServerState, chat: ChatSpec, max_tokens: int | None, owner: str, places: ExitStack, caller: Caller
) -> PreparedChat:
    """Reads the files of a chat and renders its prompt, with the files' texts before the question about them.

    Args:
        state: the server's.
        chat: the chat.
        max_tokens: maximum length of the answer; None: the request gives none.
        owner: salt of the request's API key.
        places: the request's, released when it is answered; the memory of files that came with it is released then too.
        caller: who sent the request.

    Raises:
        ApiError, DocumentError, WorkerLostError: see `attached`; 504, the files were not ready by the deadline.
        ApiError, RequestError: see `set_up` and `FairQueue.run`.
    """
    files = await attached(state, chat.messages, owner, places, caller)
    material = await state.documents.material(owner, files.digests, files.document, caller)
    setup = await _in_one_prompt(state, chat, files, material, max_tokens, caller)
    if setup is None:
        return LongChat(state, chat, files, material)
    return CitedChat(state, chat, setup, files, material)


async def _in_one_prompt(
    state: ServerState, chat: ChatSpec, files: Attached, material: Material, max_tokens: int | None, caller: Caller
) -> ChatSetup | None:
    """The prompt with the files' texts; None if it and the answer do not fit the model's context."""
    room = state.engine.room
    if material.tokens > room:
        return None
    inlined = replace(chat, messages=files.messages)
    size = caller.size + files.document.characters
    setup = await state.tokenizing(lambda lane: set_up(state, lane, inlined), caller, size)
    caller.ignored.extend(setup.ignored)
    fits = not setup.dropped and len(setup.prompt.ids) + (max_tokens or state.documents.reply) <= room
    return setup if fits else None
