"""Sources of grammars for answers in channels: OpenAI's harmony format, which gpt-oss writes.

An answer is a sequence of messages. Each has a channel: `analysis` for reasoning, `commentary` for remarks and calls, `final`
for the answer. The prompt ends with `<|start|>assistant`; the texts in `<| |>` are special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...errors import RequestError, shown
from .calls import Format, arguments_schema, as_format, check_size, either, sequence, structure_source, text
from .source import GrammarSource

_NEXT = "<|end|><|start|>assistant"
_ANY: Format = {"type": "any_text"}
_MESSAGES = 32  # maximum number of messages before the last one


def channels_source(tools: Sequence[Mapping[str, Any]], choice: str, form: GrammarSource | None = None) -> GrammarSource | None:
    """Returns the source for answers in channels.

    Args:
        tools: tools in the format of OpenAI's API.
        choice: "none": no calls; "auto": a call or a final message; "required": a call; or the name of the tool to call. An
            answer has at most one call, which ends it.
        form: grammar of the final message; None: any text.

    Returns: None if the text is not constrained.

    Raises:
        RequestError: as of `tools_source`.
    """
    if choice == "none" and form is None:
        return None
    auto = choice in ("auto", "none")
    functions = [tool["function"] for tool in tools if choice in ("auto", "required", tool["function"]["name"])]
    if choice == "none":
        functions = []
    if not functions and not auto:
        raise RequestError("tool_choice", f"there is no tool {shown(choice)}" if tools else "there are no tools to call")
    check_size(functions)
    channels = ("analysis", "commentary")
    before = either(
        [{"type": "tag", "begin": f"<|channel|>{name}<|message|>", "content": _ANY, "end": _NEXT} for name in channels]
    )
    last = [_call(function, loose=auto) for function in functions]
    if auto:
        last.append(sequence([text("<|channel|>final<|message|>"), _ANY if form is None else as_format(form)]))
    wanted = sequence([{"type": "repeat", "min": 0, "max": _MESSAGES, "content": before}, either(last)])
    return structure_source(wanted, "tools" if functions else "response_format")


def _call(function: Mapping[str, Any], loose: bool) -> Format:
    """A call. The recipient may be in the role or in the channel of the message; gpt-oss writes both."""
    to = f"to=functions.{function['name']}"
    heads = (f"<|channel|>commentary {to} <|constrain|>json<|message|>", f" {to}<|channel|>commentary json<|message|>")
    return sequence([either([text(head) for head in heads]), asdict(arguments_schema(function, loose))])
