"""A chat that is ready for the engine: its prompt is rendered, and it knows how its answers are read."""

from __future__ import annotations

from typing import Any

from ...engine.request import CompiledGrammar
from ...engine.request import Request as EngineRequest
from ..http.caller import Caller
from ..state import ServerState
from .chat_answers import ChatAnswer
from .chat_setup import ChatSetup, ChatSpec, set_up
from .grammars import Form, chat_grammar


class PreparedChat:
    """A chat in one prompt.

    Args:
        chat: what was asked for.
        setup: its prompt and the parser of its answers; None in a subclass that makes several prompts of it.
    """

    def __init__(self, state: ServerState, chat: ChatSpec, setup: ChatSetup | None) -> None:
        self.state, self.chat, self.setup = state, chat, setup

    @property
    def ids(self) -> list[int]:
        """Token ids of the prompt; empty where there is no single one."""
        return self.setup.prompt.ids if self.setup else []

    @property
    def pinned(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of prompt tokens that a cache window keeps: those of the system message."""
        return (self.setup.prompt.system,) if self.setup and self.setup.prompt.system else ()

    @property
    def keep_special(self) -> bool:
        """Whether the parser of answers must see special tokens."""
        return self.setup is not None and self.setup.keep_special

    @property
    def dropped(self) -> int:
        """Tokens of messages that were left out because the chat has outgrown the cache window."""
        return self.setup.dropped if self.setup else 0

    def check_fields(self, **wanted: object) -> None:
        """Refuses fields, given by name, whose values ask for something that this chat cannot have. One prompt can have all.

        Raises:
            ApiError: 400.
        """

    async def grammar(self, form: Form | None, parallel: bool, caller: Caller) -> CompiledGrammar | None:
        """See `chat_grammar`."""
        assert self.setup is not None
        return await chat_grammar(self.state, self.chat, self.setup, form, parallel, caller)

    def submit(self, requests: list[EngineRequest], one_call: bool) -> tuple[list[Any], list[ChatAnswer]]:
        """The engine's answers, and for each what reads it.

        Args:
            one_call: an answer may have one tool call at most.

        Raises:
            RequestError, EngineDeadError: of the first request that the engine does not take.
        """
        answers = self.state.submit(requests)
        return answers, [ChatAnswer(self.parser(), one_call) for _ in requests]

    def parser(self) -> Any:
        """A new parser of one answer; None: its text is content only."""
        return self.setup.parser() if self.setup and self.setup.parser else None


async def prepare_chat(state: ServerState, chat: ChatSpec, caller: Caller) -> PreparedChat:
    """Renders the prompt of a chat without files.

    Raises:
        ApiError, RequestError, WorkerLostError: as `set_up` and `FairQueue.run`.
        RequestError: the messages cannot fit.
    """
    state.prompt_size.check_chat(chat.messages)
    return PreparedChat(state, chat, await state.tokenizing(lambda lane: set_up(state, lane, chat), caller))
