"""Preparation of a chat: its prompt, the format of tool calls, and the parser of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...chat.deltas import OutputParser
from ...chat.fit import fit
from ...chat.messages import check_messages, check_tools
from ...chat.output_parser import make_output_parser, special_markers
from ...chat.reasoning import CLOSE, opened_by
from ...chat.template import ChatTemplate, Prompt
from ...chat.tools import FORMATS, GENERIC, HARMONY, ToolFormat, detect
from ...chat.tools.base import Enforced
from ...chat.tools.generic import with_described_tools
from ..http.problems import ApiError
from ..state import ServerState
from ..tokens.tokenizing import Lane
from .prompts import tokens_of
from .thinking import SWITCHES, closed, default_thinking

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ChatSpec:
    """A chat as requested, independent of the protocol.

    Attributes:
        messages, tools: in the format of OpenAI's chat API.
        choice: "none", "auto", "required", or the name of the tool that must be called if `named`.
        named: whether `choice` is the name of a tool.
        allowed: names of the tools that may be called; None: all. The prompt describes all tools, so that it does not change.
        several: whether an answer may have several calls; None: not given.
        effort: of reasoning; None: not given.
        options: variables of the chat template.
        skip_special: omit special tokens from the text.
        add_generation_prompt: append the start of an answer to the prompt.
        continue_final: the last message, by the assistant, is the start of the answer; overrides the above.
        cache_salt: only chats with the same salt, and the same API key, share cached pictures.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    named: bool = False
    allowed: frozenset[str] | None = None
    several: bool | None = None
    effort: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    skip_special: bool = True
    add_generation_prompt: bool = True
    continue_final: bool = False
    cache_salt: str | None = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that may be called."""
        if self.named:
            return [tool for tool in self.tools if tool["function"]["name"] == self.choice]
        if self.choice == "none":
            return []
        return [tool for tool in self.tools if self.allowed is None or tool["function"]["name"] in self.allowed]

    @property
    def has_files(self) -> bool:
        """Whether any part of a message is a file."""
        contents = (message.get("content") for message in self.messages)
        return any(part["type"] == "file" for content in contents if isinstance(content, list) for part in content)

    @property
    def has_pictures(self) -> bool:
        """Whether any part of a message is a picture."""
        contents = (message.get("content") for message in self.messages)
        return any(part["type"] == "image_url" for content in contents if isinstance(content, list) for part in content)


@dataclass(frozen=True)
class ChatSetup:
    """A prepared chat.

    Attributes:
        prompt: the rendered prompt.
        tool_format: of tool calls; None: no tools may be called.
        channels: whether the answer is written in channels, in the harmony format.
        thinking: "no", "opens" (the answer may begin with reasoning) or "open" (the prompt ends with the opening tag).
        keep_special: whether the parser needs special tokens.
        dropped: tokens of messages that were dropped because the chat exceeds the cache window.
        parser: returns a new parser for each answer, given whether a grammar enforces calls; None: the text is only content.
        ignored: names of options of the chat that the template does not have.
    """

    prompt: Prompt
    tool_format: ToolFormat | None
    channels: bool
    thinking: str
    keep_special: bool
    dropped: int
    parser: Callable[[Enforced], OutputParser] | None
    ignored: tuple[str, ...] = ()

    @property
    def may_think(self) -> bool:
        """Whether the answer may begin with reasoning. It may not if the prompt ends with empty reasoning, by which templates
        turn it off."""
        return self.thinking != "no" and not self.prompt.text.rstrip().endswith(CLOSE)


def set_up(state: ServerState, lane: Lane, chat: ChatSpec) -> ChatSetup:
    """Renders the prompt of a chat. It blocks, and uses the lane's tokenizer and template: run it by `ServerState.tokenizing`.

    Args:
        state: the server's.
        lane: of the calling thread.
        chat: the chat.

    Raises:
        ApiError: 400, `--tool-format` needs another template, or the model does not support the reasoning effort.
        RequestError: the chat template rejects the messages, the tools or an option.
        WorkerLostError: the process that renders templates was killed by something else, twice.
    """
    tools = list(chat.tools) if chat.named or chat.choice != "none" else []
    tool_format, described = _tool_format(state, lane.template) if tools else (None, False)
    in_template = tools if not described else []
    channels = detect(lane.template.source(bool(in_template))) is HARMONY
    thinking_by_default = default_thinking(state.settings.thinking, chat.effort, chat.options)
    ignored: tuple[str, ...] = ()
    if not state.settings.strict:
        chat, ignored = _with_known_options(lane, chat, bool(in_template))
    thinks = state.thinks(bool(in_template)) and not channels
    options = _options(lane, chat, bool(in_template), thinks, thinking_by_default)
    prompt, dropped = _fitted(state, lane, chat, tools, tool_format if described else None, options)
    if thinking_by_default is False and chat.add_generation_prompt and not chat.continue_final:
        prompt = closed(prompt, lane)
    output_format = HARMONY if channels else tool_format
    keep_special = (thinks or output_format is not None) and special_markers(lane.tokenizer, output_format)
    drop = [token for token in lane.tokenizer.all_special_tokens if token] if keep_special and chat.skip_special else []
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in chat.callable_tools}

    def parser(enforced: Enforced) -> OutputParser:
        return make_output_parser(
            CLOSE if thinks else "", prompt.text, tool_format=output_format, tools=schemas, enforced=enforced, drop=drop
        )

    thinking = "no" if not thinks else "open" if opened_by(prompt.text) else "opens"
    make_parser = parser if thinks or output_format or drop else None
    return ChatSetup(prompt, tool_format, channels, thinking, keep_special, dropped, make_parser, ignored)


def _fitted(
    state: ServerState,
    lane: Lane,
    chat: ChatSpec,
    tools: list[Tool],
    described: ToolFormat | None,
    options: Mapping[str, Any],
) -> tuple[Prompt, int]:
    """The prompt, and the number of tokens of dropped messages. With a cache window, a quarter of it is reserved for the answer
    and later turns.

    Args:
        described: format of calls to describe in the messages; None: the template describes the tools.
    """

    def render(some: Sequence[Mapping[str, Any]]) -> Prompt:
        in_template: list[Tool] | None = tools or None
        if described is not None and described.shape is not None:
            in_template, native = None, detect(lane.template.source()) is described and lane.template.knows_calls()
            some = with_described_tools(
                check_messages(some),
                check_tools(tools),
                described.shape,
                system=lane.template.knows_system(),
                calls=native,
            )
        return lane.template.render(
            some,
            tools=in_template,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final=chat.continue_final,
            options=options,
            max_bytes=state.prompt_size.max_bytes,
        )

    whole, window = render(chat.messages), state.engine.cache_window
    if window is None or len(whole.ids) <= window * 3 // 4:
        return whole, 0
    fitted = fit(
        [dict(message) for message in chat.messages],
        lambda some: len(render(some).ids),
        lambda message: len(tokens_of(lane.tokenizer, str(message.get("content") or ""), special=False)),
        window * 3 // 4,
    )
    prompt = render(fitted.messages)
    return prompt, len(whole.ids) - len(prompt.ids)


def _tool_format(state: ServerState, template: ChatTemplate) -> tuple[ToolFormat, bool]:
    """The format of tool calls, and whether the server describes the tools and the format, because the template does not.

    The templates of DeepSeek-R1 and V3.1 render calls, but do not describe tools.
    """
    name, knows = state.settings.tools_format, template.knows_tools()
    found = detect(template.source(tools=knows))
    tool_format = FORMATS[name] if name is not None else found or GENERIC
    described = not knows or tool_format is GENERIC
    if described and tool_format.shape is None:
        raise ApiError(
            400,
            f"tools: the format {tool_format.name} needs a template that describes tools; use --tool-format generic",
            param="tools",
        )
    return tool_format, described


def _with_known_options(lane: Lane, chat: ChatSpec, tools: bool) -> tuple[ChatSpec, tuple[str, ...]]:
    """The chat without options that the template does not have, and the names of these as fields of the request."""
    if not chat.options:
        return chat, ()
    variables = lane.template.variables(tools)
    known = {name: value for name, value in chat.options.items() if name in variables}
    return replace(chat, options=known), tuple(f"chat_template_kwargs.{name}" for name in chat.options if name not in known)


def _options(lane: Lane, chat: ChatSpec, tools: bool, thinks: bool, thinking_by_default: bool | None) -> dict[str, Any]:
    """The template's variables, with `reasoning_effort` if the template uses it, and the server's setting for thinking.

    If it does not, the effort "none" turns reasoning off, if possible (`enable_thinking`, or DeepSeek's `thinking`), and any
    other effort turns it on.
    """
    options, effort = dict(chat.options), chat.effort
    if effort is None and thinking_by_default is None:
        return options
    variables = lane.template.variables(tools)
    if effort is None:
        return options | {name: thinking_by_default for name in SWITCHES if name in variables}
    if "reasoning_effort" in variables:
        options.setdefault("reasoning_effort", effort)
    elif switch := next((name for name in SWITCHES if name in variables), None):
        options.setdefault(switch, effort != "none")
    elif effort == "none" and thinks:
        raise ApiError(400, "reasoning_effort: reasoning of this model cannot be turned off", param="reasoning_effort")
    return options


def check_choice(tools: Sequence[Tool], choice: str, named: bool, allowed: frozenset[str] | None = None) -> None:
    """Checks that the tools that must or may be called exist.

    Raises:
        ApiError: 400, they do not.
    """
    names = [tool["function"]["name"] for tool in tools]
    if named and choice not in names:
        raise ApiError(400, "tool_choice: there is no tool of that name", param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice: is required, but there are no tools", param="tool_choice")
    if allowed is not None and not allowed.issubset(names):
        raise ApiError(400, "tool_choice: allowed_tools names a tool that is not in tools", param="tool_choice")
