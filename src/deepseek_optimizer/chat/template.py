"""Converts messages to the token ids of a prompt, using the model's own chat template.

The template comes with the checkpoint and is a program, so it runs in a separate process, in Transformers' sandbox, with limits
on time, memory and output size. A request can set variables that the template reads, but not the template itself.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError
from ..system.sandbox.worker import JobError, Worker, WorkerError
from .control_tokens import ControlTokens, Encoded, Marks
from .messages import check_json, check_messages, check_tools
from .tools.base import write_json

_JOB = Path(__file__).with_name("template_job.py")
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_MAX_SHOWN = 300  # characters of a template's error message
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHORT_IDS = "length != 9"  # in Mistral's templates, which accept only ids of calls of 9 letters and digits
_THINKING = "message.thinking"  # gpt-oss's name of reasoning_content
# Tokens that end a message, besides the model's end-of-sequence token.
_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"})


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        ids: token ids.
        text: the rendered text, including control tokens.
        system: (begin, end) of the tokens up to the end of the system message, for `Request.pinned`; None if there is none, or
            its position is unknown.
    """

    ids: list[int]
    text: str
    system: tuple[int, int] | None


@dataclass(frozen=True)
class Dialogue:
    """
    Attributes:
        ids: token ids of a whole chat.
        text: the rendered text, including control tokens.
        answers: (begin, end) of the tokens of each assistant message, including the token that ends it; None: the template's
            prompts are not prefixes of the chat, or the tokenizer has no offsets.
        hidden: indices of messages that the template does not render completely.
    """

    ids: list[int]
    text: str
    answers: list[tuple[int, int]] | None
    hidden: list[int]


class _Checked(NamedTuple):
    """The validated input of a template. tools: None: no tools. shared: fields common to all payloads."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str
    controls: ControlTokens
    marks: Marks
    shared: dict[str, Any]


class _Rendered(NamedTuple):
    """text: the text to encode. edged: the messages with marks at the ends of strings; edged_text: their rendering."""

    text: str
    edged: Any
    edged_text: str
    controls: ControlTokens
    marks: Marks


class ChatTemplate:
    """
    Args:
        tokenizer: of Transformers.
        seconds: maximum CPU time of rendering.
        memory: maximum memory of rendering in bytes.
        max_characters: maximum length of a rendered prompt.
        pictures: whether messages may have places of pictures, see `check_messages`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seconds: float = 5.0,
        memory: int = 1 << 29,
        max_characters: int = 1 << 24,
        pictures: bool = False,
    ) -> None:
        self._tokenizer, self._pictures = tokenizer, pictures
        self._worker = Worker(_JOB, {"max_characters": max_characters}, seconds=seconds, memory=memory)
        self._special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._controls: dict[str, ControlTokens] = {}  # by template, which may differ with tools
        self._inspected: dict[str, Mapping[str, Any]] = {}

    def source(self, tools: bool = False) -> str:
        """The template for requests with or without tools.

        Raises:
            RequestError: the model has no chat template.
        """
        try:
            return str(self._tokenizer.get_chat_template(None, [] if tools else None))
        except ValueError:
            raise RequestError(
                "messages", "this model has no chat template; use /v1/completions, or give its tokenizer a chat_template"
            ) from None

    def variables(self, tools: bool = False) -> frozenset[str]:
        """The variables that a request may set by `options`: those that the template reads."""
        return frozenset(self._inspect(self.source(tools))["variables"]) - _OURS - set(self._special)

    def knows_tools(self) -> bool:
        """Whether the template supports tools."""
        return "tools" in self._inspect(self.source(tools=True))["variables"]

    def knows_calls(self) -> bool:
        """Whether the template renders the tool calls of earlier answers, even if it does not describe tools."""
        return bool(self._inspect(self.source())["calls"])

    def knows_system(self) -> bool:
        """Whether the template supports system messages."""
        return bool(self._inspect(self.source())["system"])

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        options: Mapping[str, Any] | None = None,
        max_bytes: int | None = None,
    ) -> Prompt:
        """The prompt of a chat. Blocks: the first call starts a process, later ones take a millisecond plus tokenization.

        Args:
            messages: as in OpenAI's API. Their text never becomes a control token.
            tools: as in OpenAI's API.
            add_generation_prompt: append the start of an assistant message.
            continue_final: the last message, by the assistant, is the start of the answer; overrides the above.
            options: values for `variables`, such as `enable_thinking`.
            max_bytes: maximum size of the text, checked before it is tokenized; None: no limit.

        Raises:
            RequestError: a message, a tool or an option is invalid, or the template fails.
            WorkerLostError: the rendering process was killed by something else, twice.
            EngineBusyError: too many requests are waiting for rendering.
        """
        rendered = self._rendered(messages, tools, add_generation_prompt, continue_final, options)
        if max_bytes is not None and len(rendered.text) > max_bytes:
            size = len(rendered.controls.plain(rendered.text, rendered.marks).encode())
            if size > max_bytes:
                raise RequestError(
                    "messages",
                    f"the prompt has {size:,} bytes, but the model's context holds at most {max_bytes:,}; shorten the messages",
                )
        encoded = rendered.controls.encode(rendered.text, rendered.marks)
        if not encoded.ids:
            raise RequestError("messages", "the prompt is empty")
        system = None
        if rendered.edged[0]["role"] == "system":
            contents = [_said(message) for message in rendered.edged[:2]]
            system = self._system_span(rendered.edged_text, contents, encoded, rendered.controls, rendered.marks)
        return Prompt(encoded.ids, encoded.text, system)

    def around(self, before: str, after: str, *, options: Mapping[str, Any] | None = None) -> tuple[Prompt, Prompt]:
        """The parts of a prompt before and after a long text, for a user message of `before` + that text + `after`. So the
        text is tokenized once, and found in the prefix cache whatever follows it.

        Args:
            options: see `render`.

        Raises:
            RequestError: see `render`; or the template modifies messages.
            EngineBusyError: see `render`.
        """
        slot = f"{secrets.randbelow(10**30):030d}"
        content = f"{before}{slot}{after}"
        rendered = self._rendered([{"role": "user", "content": content}], None, True, False, options)
        parts = rendered.text.split(slot)
        if len(parts) != 2:
            raise RequestError(
                "messages",
                "the model's chat template does not render a message unchanged and once, so documents cannot be used with it",
            )
        ends = [rendered.controls.encode(part, rendered.marks, first) for part, first in zip(parts, (True, False), strict=True)]
        first, second = (Prompt(end.ids, end.text, None) for end in ends)
        return first, second

    def _rendered(
        self,
        messages: Any,
        tools: Any,
        add_generation_prompt: bool,
        continue_final: bool,
        options: Mapping[str, Any] | None,
    ) -> _Rendered:
        rendered = self._checked(messages, tools, options)
        if continue_final and rendered.messages[-1]["role"] != "assistant":
            raise RequestError("messages", "the last message must be the assistant's to be continued")
        controls, marks = rendered.controls, rendered.marks
        edged = controls.mark_edges(rendered.messages, marks)
        texts = self._call(
            {
                **rendered.shared,
                "versions": [
                    {"messages": controls.mark(rendered.messages, marks), "tools": controls.mark(rendered.tools, marks)},
                    {"messages": edged, "tools": controls.mark_edges(rendered.tools, marks)},
                ],
                "add_generation_prompt": add_generation_prompt and not continue_final,
                "continue_final": continue_final,
            },
            marks,
        )
        joined = controls.of_template(texts[0], marks) != controls.of_template(texts[1], marks)
        return _Rendered(texts[1 if joined else 0], edged, texts[1], controls, marks)

    def _checked(self, messages: Any, tools: Any, options: Mapping[str, Any] | None) -> _Checked:
        checked = check_messages(messages, self._pictures)
        tools = check_tools(tools) if tools else None
        source = self.source(tools is not None)
        if tools is not None and not self.knows_tools():
            raise RequestError("tools", "this model's chat template does not support tools")
        variables = self._options(options or {}, tools is not None)
        if any("tool_calls" in message for message in checked) and self._inspect(source)["arguments_as_text"]:
            checked = [_arguments_as_text(message) for message in checked]
        if any(isinstance(message["content"], list) for message in checked) or self._inspect(source)["lists"]:
            checked = [_with_parts(message) for message in checked]
        if _SHORT_IDS in source:
            checked = [_with_short_ids(message) for message in checked]
        if _THINKING in source:
            checked = [_with_thinking(message) for message in checked]
        controls = self._controls.get(source) or self._controls.setdefault(source, ControlTokens(self._tokenizer, source))
        marks = Marks()
        shared = {"template": source, "variables": {**self._special, **controls.mark(variables, marks)}}
        return _Checked(checked, tools, source, controls, marks, shared)

    def dialogue(self, messages: Any, *, tools: Any = None, options: Mapping[str, Any] | None = None) -> Dialogue:
        """A whole chat with the positions of the assistant's messages, for training: as marked by the template
        (`{% generation %}`), or else the text that each message adds to the prompt before it.

        Args:
            messages, tools, options: see `render`.

        Raises:
            RequestError, EngineBusyError: see `render`.
        """
        rendered = self._checked(messages, tools, options)
        controls, marks = rendered.controls, rendered.marks
        text, places = self._answers(rendered, controls.mark)
        edged = self._call({**_whole(rendered, controls.mark_edges), "versions": [{}]}, marks)[0]
        if controls.of_template(text, marks) != controls.of_template(edged, marks):
            text, places = self._answers(rendered, controls.mark_edges)
        encoded = controls.encode(text, marks)
        if not encoded.ids:
            raise RequestError("messages", "the prompt is empty")
        answers = None
        if places is not None and encoded.begins is not None:
            begins = encoded.begins
            spans = [[len(controls.plain(text[:at], marks)) for at in place] for place in places]
            answers = [(bisect_left(begins, begin), bisect_left(begins, end)) for begin, end in spans]
        return Dialogue(encoded.ids, encoded.text, answers, _hidden(rendered.messages, encoded.text))

    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's messages by `{% generation %}`."""
        return _GENERATION.search(self.source()) is not None

    def said(self, text: str) -> list[int]:
        """Token ids of the text of a message inside a chat, none of them a control token."""
        source, marks = self.source(), Marks()
        controls = self._controls.get(source) or self._controls.setdefault(source, ControlTokens(self._tokenizer, source))
        return controls.encode(controls.mark(text, marks), marks, first=False).ids

    def _answers(self, rendered: _Checked, mark: Callable[[Any, Marks], Any]) -> tuple[str, list[tuple[int, int]] | None]:
        """The text of a whole chat with marks, and the positions of the assistant's messages in it; None if unknown."""
        payload = _whole(rendered, mark)
        if _GENERATION.search(rendered.source):
            text, places = self._call({**payload, "marked": True}, rendered.marks)
            return text, [(begin, end) for begin, end in places]
        indices = [i for i, message in enumerate(rendered.messages) if message["role"] == "assistant"]
        text, positions = self._call({**payload, "answers": indices}, rendered.marks)
        out = []
        for common, whole, before, end in positions:
            if before < 0 or end < 0:
                return text, None
            begin = common
            if not whole:  # the prompt is not a prefix of the chat (DeepSeek-R1's <think>): start after its last control token
                tokens = list(rendered.controls.places_of_template(text[before:common], rendered.marks))
                if not tokens:
                    return text, None
                begin = text.rindex(tokens[-1][1], before, common) + len(tokens[-1][1])
            out.append((begin, self._end(rendered, text, begin, end)))
        return text, out

    def _end(self, rendered: _Checked, text: str, begin: int, end: int) -> int:
        """The end of an answer: after the token that ends it, if only white space is between that and `end`."""
        stripped = text[begin:end].rstrip()
        tokens = [token for _, token in rendered.controls.places_of_template(stripped, rendered.marks)]
        ends = tokens and stripped.endswith(tokens[-1]) and (tokens[-1] in _ENDS or tokens[-1] == self._tokenizer.eos_token)
        return begin + len(stripped) if ends else end

    def close(self) -> None:
        """Ends the rendering process."""
        self._worker.close()

    def _inspect(self, source: str) -> Mapping[str, Any]:
        facts = self._inspected.get(source)
        if facts is None:
            facts = self._call({"template": source, "inspect": True, "variables": self._special}, None)
            self._inspected[source] = facts
        return facts

    def _options(self, options: Mapping[str, Any], tools: bool) -> dict[str, Any]:
        checked = check_json(options, "chat_template_kwargs") if options else {}
        known = self.variables(tools) if checked else frozenset()
        for name in checked:
            if name not in known:
                has = f"it has {', '.join(sorted(known))}" if known else "it has no options"
                raise RequestError(str(name), f"the model's chat template has no such option; {has}")
        return checked

    def _call(self, payload: Mapping[str, Any], marks: Marks | None) -> Any:
        try:
            return self._worker.call(payload)
        except JobError as error:
            reason = str(error)
            for mark in (marks.begin, marks.end, marks.edge) if marks else ():
                reason = reason.replace(mark, "")
            raise RequestError("messages", f"the model's chat template rejects them: {reason[:_MAX_SHOWN]}") from None
        except WorkerError as error:
            raise RequestError("messages", f"the model's chat template fails on them: {error}") from None

    def _system_span(
        self, edged: str, contents: list[str], encoded: Encoded, controls: ControlTokens, marks: Marks
    ) -> tuple[int, int] | None:
        """The tokens of a prompt up to the end of the first message, including the text that the template puts after it.

        Args:
            edged: the rendering with marks at the ends of strings.
            contents: of the first two messages, with those marks.
        """
        content = contents[0].strip()
        at = edged.find(content) if content else -1
        if at < 0 or encoded.begins is None:
            return None
        after = at + len(content)
        text = controls.plain(edged[:after], marks)
        following = edged.find(contents[1].strip(), after) if len(contents) > 1 else len(edged)
        if following >= 0:
            layout = edged[after:following]
            places = list(controls.places_of_template(layout, marks))
            ends = [at + len(token) for at, token in places if token in _ENDS or token == self._tokenizer.eos_token]
            end = ends[0] if ends else places[0][0] if places else 0
            text += controls.plain(layout, marks)[:end]
        if not encoded.text.startswith(text):
            return None
        return 0, bisect_left(encoded.begins, len(text))


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its content as a list, which some templates for pictures require for all messages."""
    content = message["content"]
    return message if isinstance(content, list) else {**message, "content": [{"type": "text", "text": content}]}


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": write_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message with ids of calls of 9 letters and digits, the same for the same id."""
    out = dict(message)
    if "tool_calls" in message:
        out["tool_calls"] = [{**call, "id": _short_id(call.get("id", ""))} for call in message["tool_calls"]]
    if message["role"] == "tool":
        out["tool_call_id"] = _short_id(message.get("tool_call_id", ""))
    return out


def _short_id(id: str) -> str:
    return id if len(id) == 9 and id.isascii() and id.isalnum() else hashlib.sha256(id.encode()).hexdigest()[:9]


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the name that gpt-oss's template reads, which refuses it together with content."""
    if "reasoning_content" not in message or (message["content"] and "tool_calls" in message):
        return message
    return {**message, "thinking": message["reasoning_content"]}


def _whole(rendered: _Checked, mark: Callable[[Any, Marks], Any]) -> dict[str, Any]:
    """The payload of a whole chat for the worker."""
    messages, tools = mark(rendered.messages, rendered.marks), mark(rendered.tools, rendered.marks)
    more = {"messages": messages, "tools": tools, "add_generation_prompt": False, "continue_final": False}
    return {**rendered.shared, **more}


def _said(message: Mapping[str, Any]) -> str:
    """The first text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else next((part["text"] for part in content if part["type"] == "text"), "")


def _hidden(messages: list[dict[str, Any]], text: str) -> list[int]:
    """Indices of messages whose content or reasoning is not completely in the text."""
    texts = [(_said(message).strip(), message.get("reasoning_content", "").strip()) for message in messages]
    return [i for i, parts in enumerate(texts) if any(part not in text for part in parts)]
