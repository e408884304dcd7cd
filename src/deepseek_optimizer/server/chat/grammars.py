"""Grammars that constrain the text of an answer: JSON, a schema, a regular expression, a grammar, or tool calls."""

from __future__ import annotations

import logging

from ...chat.reasoning import CLOSE, OPEN
from ...chat.tools import GENERIC, HARMONY
from ...engine.grammar.source import GrammarSource
from ...engine.request import CompiledGrammar
from ...errors import RequestError
from ..http.caller import Caller
from ..state import ServerState
from .chat_setup import ChatSetup, ChatSpec
from .forms import Form, source_of

logger = logging.getLogger("deepseek_optimizer.server")


async def compiled(state: ServerState, form: Form | None, caller: Caller) -> CompiledGrammar | None:
    """Compiles the grammar of a form; None if there is no form.

    Raises:
        RequestError: it is invalid, or takes too long to compile.
        WorkerLostError: the process that compiled it was killed by something else, twice.
        ApiError: see `FairQueue.run`.
    """
    return None if form is None else await state.compiling(lambda: source_of(form), caller)


async def chat_grammar(
    state: ServerState, chat: ChatSpec, setup: ChatSetup, form: Form | None, parallel: bool, caller: Caller
) -> CompiledGrammar | None:
    """The grammar of a chat's answer, for its form and for tool calls. Reasoning before it is unconstrained.

    If the model may but need not call tools, and the grammar of the calls cannot be compiled, calls are recognized without it.

    Args:
        state: the server's.
        chat: the chat.
        setup: its prompt and formats.
        form: of the answer's text; None: any. It does not apply to tool calls.
        parallel: whether several tool calls are allowed.
        caller: who sent the request.

    Raises:
        RequestError, WorkerLostError, ApiError: see `compiled`.
    """
    tool_format = HARMONY if setup.channels else setup.tool_format
    if tool_format is None:
        grammar = await compiled(state, form, caller)
        return None if grammar is None else _after_thoughts(state, setup, grammar)
    choice = "none" if setup.tool_format is None else "required" if chat.named else chat.choice
    # A tool is called once if the request names it, and by default if the model has not been trained to call tools: it would
    # repeat the call.
    if chat.named or (choice == "required" and setup.tool_format is GENERIC and chat.several is None):
        parallel = False
    optional = choice == "auto" and form is None

    def source() -> GrammarSource | None:
        return tool_format.source(chat.callable_tools, choice, parallel, None if form is None else source_of(form))

    try:
        grammar = await state.compiling(source, caller)
        return None if grammar is None else _after_thoughts(state, setup, grammar)
    except RequestError as error:
        if not optional:
            raise
        logger.info("optional tool calls are not constrained, since their grammar cannot be compiled: %s", error)
        return None


def _after_thoughts(state: ServerState, setup: ChatSetup, grammar: CompiledGrammar) -> CompiledGrammar:
    if setup.thinking == "no":
        return grammar
    return state.grammars.after_thoughts(grammar, OPEN, CLOSE, setup.thinking == "open")
