"""Chats with files: in one prompt like any chat where everything fits, or else answered by a strategy for long documents."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ...chat.reasoning import ReasoningParser
from ...engine.request import CompiledGrammar
from ...engine.request import Request as EngineRequest
from ...longdoc.material import Material
from ..chat.chat_answers import ChatAnswer
from ..chat.chat_setup import ChatSetup, ChatSpec, set_up
from ..chat.grammars import Form
from ..chat.prepared import PreparedChat
from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState
from .answers import CitedAnswers, DocumentAnswers
from .attachments import Attached, attached


class CitedChat(PreparedChat):
    """A chat whose files are in its prompt; its answers get citations."""

    def __init__(self, state: ServerState, chat: ChatSpec, setup: ChatSetup, files: Attached, material: Material) -> None:
        super().__init__(state, chat, setup)
        self._files, self._material = files, material

    def submit(self, requests: list[EngineRequest], one_call: bool) -> tuple[list[Any], list[ChatAnswer]]:
        """As `PreparedChat.submit`."""
        answers, parsed = super().submit(requests, one_call)
        cited = [
            CitedAnswers(self.state, one, answer, self.parser(), self._files, self._material)
            for one, answer in zip(answers, parsed, strict=True)
        ]
        return cited, parsed


class LongChat(PreparedChat):
    """A chat whose files do not fit one prompt. It takes one request, whose prompt is not used."""

    def __init__(self, state: ServerState, chat: ChatSpec, files: Attached, material: Material) -> None:
        super().__init__(state, chat, None)
        self._files, self._material = files, material

    def check_fields(self, **wanted: object) -> None:
        """As `PreparedChat.check_fields`: refuses every field whose value is true."""
        for name, value in wanted.items():
            if value:
                raise ApiError(
                    400,
                    f"{name}: not with documents that, with the answer, are longer than the model's context; leave it out, or "
                    "send less text",
                    param=name,
                )

    async def grammar(self, form: Form | None, parallel: bool, caller: Caller) -> CompiledGrammar | None:
        """None: `check_fields` has refused what needs one."""
        return None

    def submit(self, requests: list[EngineRequest], one_call: bool) -> tuple[list[Any], list[ChatAnswer]]:
        """As `PreparedChat.submit`."""
        (request,) = requests
        parsed = ChatAnswer(ReasoningParser())
        return [DocumentAnswers(self.state, self._files, self._material, request, parsed)], [parsed]


async def prepare_chat_with_files(
    state: ServerState, chat: ChatSpec, max_tokens: int | None, owner: str, places: ExitStack, caller: Caller
) -> PreparedChat:
    """Reads the files of a chat and renders its prompt, with the files' texts before the question about them.

    Args:
        max_tokens: that the request allows the answer; None: it does not say.
        owner: salt of the key that asks.
        places: the request's, given back when it is answered; memory of files that came with it is given back with them.

    Raises:
        ApiError, DocumentError, WorkerLostError: as `attached`; 504, the files were not ready by the deadline.
        ApiError, RequestError: as `set_up` and `FairQueue.run`.
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
    """None: the files and the answer do not fit the model's context together."""
    room = state.engine.room
    if material.tokens > room:
        return None
    inlined = replace(chat, messages=files.messages)
    size = caller.size + files.document.characters
    setup = await state.tokenizing(lambda lane: set_up(state, lane, inlined), caller, size)
    fits = not setup.dropped and len(setup.prompt.ids) + (max_tokens or state.documents.reply) <= room
    return setup if fits else None
