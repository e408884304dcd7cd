"""Grammars that constrain the text of an answer: JSON, a schema, a regular expression, a grammar, or tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...chat.reasoning import CLOSE, OPEN
from ...chat.tools import HARMONY
from ...engine.grammar.source import (
    GrammarSource,
    ebnf_source,
    object_source,
    regex_source,
    schema_source,
)
from ...engine.request import CompiledGrammar
from ...errors import RequestError
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.formats import Guided, JsonObjectFormat, JsonSchemaFormat
from ..state import ServerState
from .chat_setup import ChatSetup, ChatSpec


@dataclass(frozen=True)
class Form:
    """The required form of an answer's text. `value`: a schema, a regular expression or a grammar."""

    kind: Literal["json_object", "json_schema", "regex", "ebnf"]
    value: Any = None


def form_of(guided: Guided) -> Form | None:
    """The form that the fields of a request require; None if they require none.

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
            400, "response_format: give only one of response_format, guided_regex, guided_grammar", param="response_format"
        )
    return forms[0] if forms else None


async def compiled(state: ServerState, form: Form | None, caller: Caller) -> CompiledGrammar | None:
    """Compiles the grammar of a form; None if there is no form.

    Raises:
        RequestError: it is invalid, or takes too long to compile.
        WorkerLostError: the process that compiled it was killed by something else, twice.
        ApiError: see `FairQueue.run`.
    """
    return None if form is None else await state.compiling(lambda: source_of(form), caller)


def source_of(form: Form) -> GrammarSource:
    """The source of a form's grammar; errors as of `schema_source`."""
    make: dict[str, Callable[[], GrammarSource]] = {
        "json_object": object_source,
        "json_schema": lambda: schema_source(form.value),
        "regex": lambda: regex_source(form.value),
        "ebnf": lambda: ebnf_source(form.value),
    }
    return make[form.kind]()


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
    optional = choice == "auto" and form is None

    def source() -> GrammarSource | None:
        return tool_format.source(chat.callable_tools, choice, parallel, None if form is None else source_of(form))

    try:
        grammar = await state.compiling(source, caller)
        return None if grammar is None else _after_thoughts(state, setup, grammar)
    except RequestError:
        if not optional:
            raise
        return None


def _after_thoughts(state: ServerState, setup: ChatSetup, grammar: CompiledGrammar) -> CompiledGrammar:
    if setup.thinking == "no":
        return grammar
    return state.grammars.after_thoughts(grammar, OPEN, CLOSE, setup.thinking == "open")
