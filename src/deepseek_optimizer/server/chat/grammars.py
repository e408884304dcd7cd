"""Grammars that constrain the text of an answer: JSON, a schema, a regular expression, a grammar, or tool calls."""

from __future__ import annotations

from ...chat.reasoning import CLOSE, OPEN
from ...engine.grammar.source import tools_source
from ...engine.request import CompiledGrammar
from ..http.caller import Caller
from ..http.problems import ApiError
from ..state import ServerState
from .chat_setup import ChatSetup, ChatSpec
from .forms import Form, source_of


async def compiled(state: ServerState, form: Form | None, caller: Caller) -> CompiledGrammar | None:
    """Compiles the grammar of a form; None if there is no form.

    Raises:
        RequestError: it is invalid, or takes too long to compile.
        WorkerLostError: the process that compiled it was killed by something else, twice.
        ApiError: see `FairQueue.run`.
    """
    if form is None:
        return None
    return await state.compiling(lambda: source_of(form), caller)


async def chat_grammar(
    state: ServerState, chat: ChatSpec, setup: ChatSetup, form: Form | None, parallel: bool, caller: Caller
) -> CompiledGrammar | None:
    """The grammar of a chat's answer, for its form or for required tool calls. Reasoning before it is unconstrained.

    Args:
        state: the server's.
        chat: the chat.
        setup: its prompt and formats.
        form: of the answer's text; None: any.
        parallel: whether several tool calls are allowed.
        caller: who sent the request.

    Raises:
        ApiError: 400, both a form and tools were given.
        RequestError, WorkerLostError, ApiError: see `compiled`.
    """
    tool_format = setup.tool_format
    if form is not None and tool_format is not None:
        raise ApiError(
            400, 'tools: not supported with a response format; give one of them, or tool_choice "none"', param="tools"
        )
    if tool_format is None or (chat.choice != "required" and not chat.named):
        grammar = await compiled(state, form, caller)
    else:
        shape = tool_format.shape
        tools = [tool for tool in chat.tools if not chat.named or tool["function"]["name"] == chat.choice]
        if shape is None:
            raise ApiError(400, "tool_choice: required calls are not supported in this model's format", param="tool_choice")
        grammar = await state.compiling(lambda: tools_source(tools, "required", shape, parallel), caller)
    if grammar is None or setup.thinking == "no":
        return grammar
    return state.grammars.after_thoughts(grammar, OPEN, CLOSE, setup.thinking == "open")
