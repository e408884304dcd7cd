"""A chat that is ready for the engine: its rendered prompt, and the parser of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...chat.tools.base import Enforced
from ...engine.pictures import PictureRows
from ...engine.request import CompiledGrammar
from ...engine.request import Request as EngineRequest
from ..http.caller import Caller
from ..state import ServerState
from .chat_answers import ChatAnswer
from .chat_setup import ChatSetup, ChatSpec, set_up
from .forms import Form
from .grammars import chat_grammar


class PreparedChat:
    """A chat in one prompt.

    Args:
        state: the server's.
        chat: the chat as requested.
        setup: its prompt and the parser of its answers; None in a subclass that uses several prompts.
    """

    def __init__(self, state: ServerState, chat: ChatSpec, setup: ChatSetup | None) -> None:
        self.state, self.chat, self.setup = state, chat, setup
        self._enforced: Enforced = "no"  # calls that the grammar enforces

    @property
    def ids(self) -> list[int]:
        """Token ids of the prompt; empty if there is no single prompt."""
        return self.setup.prompt.ids if self.setup else []

    @property
    def pictures(self) -> PictureRows | None:
        """The prompt's rows of pictures."""
        return None

    @property
    def text(self) -> str:
        """Text of the prompt, with control tokens; empty if there is no single prompt."""
        return self.setup.prompt.text if self.setup else ""

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
        """Tokens of messages that were dropped because the chat exceeds the cache window."""
        return self.setup.dropped if self.setup else 0

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Sampling parameters for fields that the request omits; some models have others for answers without reasoning."""
        settings = self.state.settings
        if settings.sampling_not_thinking is None or self.setup is None or self.setup.may_think:
            return settings.sampling
        return settings.sampling_not_thinking

    def check_fields(self, **wanted: object) -> None:
        """Refuses fields that this kind of chat does not support. A chat in one prompt supports all.

        Args:
            wanted: values of the fields by name; a false one is not used.

        Raises:
            ApiError: 400, a field is not supported.
        """

    async def grammar(self, form: Form | None, parallel: bool, caller: Caller) -> CompiledGrammar | None:
        """See `chat_grammar`."""
        assert self.setup is not None
        grammar = await chat_grammar(self.state, self.chat, self.setup, form, parallel, caller)
        if grammar is not None and self.setup.tool_format is not None:
            self._enforced = "auto" if self.chat.choice == "auto" and not self.chat.named else "required"
        return grammar

    def submit(
        self, requests: list[EngineRequest], one_call: bool, start: Callable[[list[EngineRequest]], list[Any]] | None = None
    ) -> tuple[list[Any], list[ChatAnswer]]:
        """Submits the requests to the engine.

        Args:
            requests: one per answer.
            one_call: drop all tool calls of an answer but the first.
            start: starts the answers instead of `ServerState.submit`.

        Returns: the engine's answers, and a parser for each.

        Raises:
            RequestError, EngineDeadError: for the first request that the engine refuses.
        """
        answers = (start or self.state.submit)(requests)
        return answers, [ChatAnswer(self.parser(), one_call) for _ in requests]

    def parser(self) -> Any:
        """A new parser for one answer; None: its text is only content."""
        return self.setup.parser(self._enforced) if self.setup and self.setup.parser else None


async def prepare_chat(state: ServerState, chat: ChatSpec, caller: Caller) -> PreparedChat:
    """Renders the prompt of a chat without files.

    Raises:
        ApiError, RequestError, WorkerLostError: see `set_up` and `FairQueue.run`.
        RequestError: the messages cannot fit.
    """
    state.prompt_size.check_chat(chat.messages)
    setup = await state.tokenizing(lambda lane: set_up(state, lane, chat), caller)
    caller.ignored.extend(setup.ignored)
    return PreparedChat(state, chat, setup)
