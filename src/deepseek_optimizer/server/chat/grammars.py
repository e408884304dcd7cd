"""What the text of an answer is held to: JSON, a schema, a regular expression, a grammar, calls of tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...chat.reasoning import CLOSE, OPEN
from ...engine.grammar.source import (
    GrammarSource,
    ebnf_source,
    object_source,
    regex_source,
    schema_source,
    tools_source,
)
from ...engine.request import CompiledGrammar
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.formats import Guided, JsonObjectFormat, JsonSchemaFormat
from ..state import ServerState
from .chat_setup import ChatSetup, ChatSpec


@dataclass(frozen=True)
class Form:
    """Of an answer's text, where one is asked for. `value`: a schema, a regular expression or a grammar."""

    kind: Literal["json_object", "json_schema", "regex", "ebnf"]
    value: Any = None


def form_of(guided: Guided) -> Form | None:
    """What the fields of a request ask for.

    Raises:
        ApiError: 400, more than one form.
    """
    forms = []
    if guided.guided_regex is not None:
        forms.append(Form("regex", guided.guided_regex))
    if guided.guided_grammar is not None:
        forms.append(Form("ebnf", guided.guided_grammar))
    if isinstance(guided.response_format, JsonObjectFormat):
        forms.append(Form("json_object"))
    elif isinstance(guided.response_format, JsonSchemaFormat):
        schema = guided.response_format.json_schema.schema_
        forms.append(Form("json_object") if schema is None else Form("json_schema", schema))
    if len(forms) > 1:
        raise ApiError(
            400, "response_format: only one of response_format, guided_regex and guided_grammar", param="response_format"
        )
    return forms[0] if forms else None


async def compiled(state: ServerState, form: Form | None, caller: Caller) -> CompiledGrammar | None:
    """The grammar of a form; None where there is none.

    Raises:
        RequestError: it is wrong, or takes too long to compile.
        WorkerLostError: something else ended the process that compiled it, twice.
        ApiError: as of `FairQueue.run`.
    """
    if form is None:
        return None
    make: dict[str, Callable[[], GrammarSource]] = {
        "json_object": object_source,
        "json_schema": lambda: schema_source(form.value),
        "regex": lambda: regex_source(form.value),
        "ebnf": lambda: ebnf_source(form.value),
    }
    return await state.compiling(make[form.kind], caller)


async def chat_grammar(
    state: ServerState, chat: ChatSpec, setup: ChatSetup, form: Form | None, parallel: bool, caller: Caller
) -> CompiledGrammar | None:
    """What a chat's answer is held to: a form, or calls of tools that must be made. Thoughts before it are free.

    Args:
        parallel: whether there may be several calls.

    Raises:
        ApiError: 400, a form and tools that may be called, which exclude each other.
        RequestError, WorkerLostError, ApiError: as of `compiled`.
    """
    tool_format = setup.tool_format
    if form is not None and tool_format is not None:
        raise ApiError(400, 'tools: not with a form of the text; give either, or tool_choice "none"', param="tools")
    if tool_format is None or (chat.choice != "required" and not chat.named):
        grammar = await compiled(state, form, caller)
    else:
        shape = tool_format.shape
        tools = [tool for tool in chat.tools if not chat.named or tool["function"]["name"] == chat.choice]
        if shape is None:
            raise ApiError(400, "tool_choice: calls in this model's format can't be forced", param="tool_choice")
        grammar = await state.compiling(lambda: tools_source(tools, "required", shape, parallel), caller)
    if grammar is None or setup.thinking == "no":
        return grammar
    return state.grammars.after_thoughts(grammar, OPEN, CLOSE, setup.thinking == "open")
