"""What a chat's answers are made of and parsed by: the prompt, the tools that may be called, thoughts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...chat.deltas import OutputParser
from ...chat.fit import fit
from ...chat.output_parser import make_output_parser, special_markers
from ...chat.reasoning import CLOSE, opened_by
from ...chat.template import Prompt
from ...chat.tools import FORMATS, ToolFormat, detect
from ..http.problems import ApiError
from ..state import ServerState
from ..tokens.tokenising import Lane
from .prompts import tokens_of

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ChatSpec:
    """What a request says of it, whichever protocol it came by.

    Attributes:
        messages, tools: as OpenAI's chat API has them.
        choice: "none", "auto", "required", or where it is `named` the name of the tool that must be called.
        effort: of reasoning.
        options: variables of the chat template.
        skip_special: leave special tokens out of the text.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: str = "auto"
    named: bool = False
    effort: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    skip_special: bool = True

    @property
    def has_files(self) -> bool:
        """Whether any part of a message is a file."""
        contents = (message.get("content") for message in self.messages)
        return any(part["type"] == "file" for content in contents if isinstance(content, list) for part in content)


@dataclass(frozen=True)
class ChatSetup:
    """
    Attributes:
        prompt: to be continued.
        tool_format: how tools are called; None: none may be.
        thinking: "no", "opens": the answer may open thoughts, "open": the prompt has.
        keep_special: the parser must see special tokens.
        dropped: tokens of messages that were left out because the dialogue has outgrown the window.
        parser: makes one for each answer; None: the text is nothing but content.
    """

    prompt: Prompt
    tool_format: ToolFormat | None
    thinking: str
    keep_special: bool
    dropped: int
    parser: Callable[[], OutputParser] | None


def set_up(state: ServerState, lane: Lane, asked: ChatSpec) -> ChatSetup:
    """Blocks, and uses the lane's tokenizer and template: for `ServerState.tokenizing`.

    Raises:
        ApiError: 400, tools that this model can't call, or an effort that it can't make.
        RequestError: the chat template does not take the messages, the tools or an option.
        WorkerLostError: something else ended the process that renders templates, twice.
    """
    tools = list(asked.tools) if asked.named or asked.choice != "none" else []
    source = lane.template.source(bool(tools))
    tool_format = _tool_format(state, source) if tools else None
    thinks = state.thinks(bool(tools))
    options = _options(lane, asked, bool(tools), thinks)
    prompt, dropped = _fitted(state, lane, asked.messages, tools, options)
    keep_special = (thinks or tool_format is not None) and special_markers(lane.tokenizer, tool_format)
    drop = [token for token in lane.tokenizer.all_special_tokens if token] if keep_special and asked.skip_special else []
    names = [tool["function"]["name"] for tool in tools]

    def parser() -> OutputParser:
        return make_output_parser(CLOSE if thinks else "", prompt.text, tool_format=tool_format, tool_names=names, drop=drop)

    thinking = "no" if not thinks else "open" if opened_by(prompt.text) else "opens"
    return ChatSetup(prompt, tool_format, thinking, keep_special, dropped, parser if thinks or tool_format or drop else None)


def _fitted(
    state: ServerState, lane: Lane, messages: Sequence[Mapping[str, Any]], tools: list[Tool], options: Mapping[str, Any]
) -> tuple[Prompt, int]:
    """The prompt, and how many tokens of messages are not in it. Where there is a window, a quarter of it is left for the
    answer and the turns to come."""

    def render(some: Sequence[Mapping[str, Any]]) -> Prompt:
        return lane.template.render(some, tools=tools or None, options=options, max_bytes=state.prompt_size.most)

    whole, window = render(messages), state.engine.cache_window
    if window is None or len(whole.ids) <= window * 3 // 4:
        return whole, 0
    fitted = fit(
        [dict(message) for message in messages],
        lambda some: len(render(some).ids),
        lambda message: len(tokens_of(lane.tokenizer, str(message.get("content") or ""), special=False)),
        window * 3 // 4,
    )
    prompt = render(fitted.messages)
    return prompt, len(whole.ids) - len(prompt.ids)


def _tool_format(state: ServerState, source: str) -> ToolFormat:
    wanted = state.settings.tools_format
    found = detect(source) if wanted is None else FORMATS[wanted]
    if found is None:
        raise ApiError(400, "tools: this model's chat template teaches no way to call them that is known here", param="tools")
    return found


def _options(lane: Lane, asked: ChatSpec, tools: bool, thinks: bool) -> dict[str, Any]:
    """The template's variables, with `reasoning_effort` where it knows it.

    Where it does not, "none" still asks a model that thinks not to (`enable_thinking`, or DeepSeek's `thinking`), and any other
    effort is what the model does anyhow.
    """
    options, effort = dict(asked.options), asked.effort
    if effort is None:
        return options
    variables = lane.template.variables(tools)
    if "reasoning_effort" in variables:
        options.setdefault("reasoning_effort", effort)
    elif switch := next((name for name in ("enable_thinking", "thinking") if name in variables), None):
        options.setdefault(switch, effort != "none")
    elif effort == "none" and thinks:
        raise ApiError(400, "reasoning_effort: this model always thinks", param="reasoning_effort")
    return options


def check_choice(tools: Sequence[Tool], choice: str, named: bool) -> None:
    """
    Raises:
        ApiError: 400, a call is asked for that no tool can answer.
    """
    names = [tool["function"]["name"] for tool in tools]
    if named and choice not in names:
        raise ApiError(400, "tool_choice: there is no tool of that name", param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice: required, and there are no tools", param="tool_choice")
