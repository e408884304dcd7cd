"""Messages to the token ids of a prompt, by the model's own chat template.

The template comes with the checkpoint and is a program, so it runs in a process of its own, in Transformers' sandbox, with
limits on time, memory and the size of what it makes. A request can set variables that the template reads, never the template.
"""

from __future__ import annotations

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
_MAX_SHOWN = 300  # characters of an error that a template raises
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Tokens that end a message, beside the model's own end of text.
_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"})


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        ids: token ids.
        text: what they say, control tokens included.
        system: (begin, end) of the tokens up to the end of the system message, for `Request.pinned`; None where there is none,
            or where its place can't be told.
    """

    ids: list[int]
    text: str
    system: tuple[int, int] | None


@dataclass(frozen=True)
class Dialogue:
    """
    Attributes:
        ids: token ids of a whole chat.
        text: what they say, control tokens included.
        answers: (begin, end) of the tokens that the assistant's messages consist of, each up to the token that ends it; None:
            the template makes no prompts that the chat goes on from, or the tokenizer can't tell where tokens begin.
        hidden: indices of messages of which the template does not show all that they say.
    """

    ids: list[int]
    text: str
    answers: list[tuple[int, int]] | None
    hidden: list[int]


class _Checked(NamedTuple):
    """What a template gets, checked. tools: None: no tools. shared: of a payload, whatever is rendered."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str
    controls: ControlTokens
    marks: Marks
    shared: dict[str, Any]


class _Rendered(NamedTuple):
    """text: to be encoded. edged: the messages with marks at the ends of strings, and edged_text what they make."""

    text: str
    edged: Any
    edged_text: str
    controls: ControlTokens
    marks: Marks


class ChatTemplate:
    """
    Args:
        tokenizer: of Transformers.
        seconds: of CPU time that rendering may take.
        memory: bytes that it may take.
        max_characters: of a rendered prompt.
    """

    def __init__(self, tokenizer: Any, *, seconds: float = 5.0, memory: int = 1 << 29, max_characters: int = 1 << 24) -> None:
        self._tokenizer = tokenizer
        self._worker = Worker(_JOB, {"most": max_characters}, seconds=seconds, memory=memory)
        self._special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self._controls: dict[str, ControlTokens] = {}  # by template: with tools it may be another
        self._inspected: dict[str, Mapping[str, Any]] = {}

    def source(self, tools: bool = False) -> str:
        """The template that requests with or without tools get.

        Raises:
            RequestError: the model has none.
        """
        try:
            return str(self._tokenizer.get_chat_template(None, [] if tools else None))
        except ValueError:
            raise RequestError(
                "messages", "this model has no chat template; use /v1/completions, or give its tokenizer a chat_template"
            ) from None

    def variables(self, tools: bool = False) -> frozenset[str]:
        """What a request may set by `options`: the variables that the template reads."""
        return frozenset(self._inspect(self.source(tools))["variables"]) - _OURS - set(self._special)

    def knows_tools(self) -> bool:
        """Whether the template tells the model about tools."""
        return "tools" in self._inspect(self.source(tools=True))["variables"]

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
        """The prompt of a chat. Blocks: the first one starts a process, a later one takes a millisecond and its tokenizing.

        Args:
            messages: as OpenAI's API has them. What they say never becomes a control token.
            tools: as OpenAI's API has them.
            add_generation_prompt: ends with what an answer begins with.
            continue_final: the last message, of the assistant, is the beginning of the answer; then without the above.
            options: values for `variables`, such as `enable_thinking`.
            max_bytes: of the text, beyond which it is refused before it is tokenised; None: any number.

        Raises:
            RequestError: a message, a tool or an option is not what it should be, or the template fails.
            WorkerLostError: something else ended the process that renders, twice.
            EngineBusyError: too many others are waiting for theirs.
        """
        made = self._rendered(messages, tools, add_generation_prompt, continue_final, options)
        if max_bytes is not None and len(made.text) > max_bytes:
            size = len(made.controls.plain(made.text, made.marks).encode())
            if size > max_bytes:
                raise RequestError(
                    "messages",
                    f"they make a prompt of {size:,} bytes, and the model's context holds {max_bytes:,} at most; shorten them",
                )
        encoded = made.controls.encode(made.text, made.marks)
        if not encoded.ids:
            raise RequestError("messages", "they make an empty prompt")
        system = None
        if made.edged[0]["role"] == "system":
            contents = [message["content"] for message in made.edged[:2]]
            system = self._system_span(made.edged_text, contents, encoded, made.controls, made.marks)
        return Prompt(encoded.ids, encoded.text, system)

    def around(self, before: str, after: str, *, options: Mapping[str, Any] | None = None) -> tuple[Prompt, Prompt]:
        """What stands before and behind a long text in a prompt, of which a person says `before` + that text + `after`: so that
        its tokens can be made once, and found in the prefix cache whatever follows them.

        Args:
            options: as of `render`.

        Raises:
            RequestError: as of `render`, or the template changes what people say.
            EngineBusyError: as of `render`.
        """
        slot = f"{secrets.randbelow(10**30):030d}"
        content = f"{before}{slot}{after}"
        made = self._rendered([{"role": "user", "content": content}], None, True, False, options)
        parts = made.text.split(slot)
        if len(parts) != 2:
            raise RequestError("messages", "the model's chat template does not show a message as it is, once")
        ends = [made.controls.encode(part, made.marks, first) for part, first in zip(parts, (True, False), strict=True)]
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
        made = self._checked(messages, tools, options)
        if continue_final and made.messages[-1]["role"] != "assistant":
            raise RequestError("messages", "only a last message of the assistant can be continued")
        controls, marks = made.controls, made.marks
        edged = controls.mark_edges(made.messages, marks)
        texts = self._call(
            {
                **made.shared,
                "versions": [
                    {"messages": controls.mark(made.messages, marks), "tools": controls.mark(made.tools, marks)},
                    {"messages": edged, "tools": controls.mark_edges(made.tools, marks)},
                ],
                "add_generation_prompt": add_generation_prompt and not continue_final,
                "continue_final": continue_final,
            },
            marks,
        )
        joined = controls.of_template(texts[0], marks) != controls.of_template(texts[1], marks)
        return _Rendered(texts[1 if joined else 0], edged, texts[1], controls, marks)

    def _checked(self, messages: Any, tools: Any, options: Mapping[str, Any] | None) -> _Checked:
        checked = check_messages(messages)
        tools = check_tools(tools) if tools else None
        source = self.source(tools is not None)
        if tools is not None and not self.knows_tools():
            raise RequestError("tools", "this model's chat template has no place for tools")
        variables = self._options(options or {}, tools is not None)
        if any("tool_calls" in message for message in checked) and self._inspect(source)["arguments_as_text"]:
            checked = [_arguments_as_text(message) for message in checked]
        controls = self._controls.get(source) or self._controls.setdefault(source, ControlTokens(self._tokenizer, source))
        marks = Marks()
        shared = {"template": source, "variables": {**self._special, **controls.mark(variables, marks)}}
        return _Checked(checked, tools, source, controls, marks, shared)

    def dialogue(self, messages: Any, *, tools: Any = None, options: Mapping[str, Any] | None = None) -> Dialogue:
        """A whole chat, and where in it the assistant speaks, for training: where the template marks it
        (`{% generation %}`), or else what each message adds to the prompt that it answers.

        Args:
            messages, tools, options: as of `render`.

        Raises:
            RequestError, EngineBusyError: as of `render`.
        """
        made = self._checked(messages, tools, options)
        controls, marks = made.controls, made.marks
        text, places = self._answers(made, controls.mark)
        edged = self._call({**_whole(made, controls.mark_edges), "versions": [{}]}, marks)[0]
        if controls.of_template(text, marks) != controls.of_template(edged, marks):
            text, places = self._answers(made, controls.mark_edges)
        encoded = controls.encode(text, marks)
        if not encoded.ids:
            raise RequestError("messages", "they make an empty prompt")
        answers = None
        if places is not None and encoded.begins is not None:
            begins = encoded.begins
            spans = [[len(controls.plain(text[:at], marks)) for at in place] for place in places]
            answers = [(bisect_left(begins, begin), bisect_left(begins, end)) for begin, end in spans]
        return Dialogue(encoded.ids, encoded.text, answers, _hidden(made.messages, encoded.text))

    def marks_answers(self) -> bool:
        """Whether the template says itself where the assistant speaks, by `{% generation %}`."""
        return _GENERATION.search(self.source()) is not None

    def said(self, text: str) -> list[int]:
        """Token ids of what someone says in the midst of a chat: none of them is a control token."""
        source, marks = self.source(), Marks()
        controls = self._controls.get(source) or self._controls.setdefault(source, ControlTokens(self._tokenizer, source))
        return controls.encode(controls.mark(text, marks), marks, first=False).ids

    def _answers(self, made: _Checked, mark: Callable[[Any, Marks], Any]) -> tuple[str, list[tuple[int, int]] | None]:
        """A whole chat's text with marks, and where in it the assistant's messages stand; None: that can't be told."""
        payload = _whole(made, mark)
        if _GENERATION.search(made.source):
            text, places = self._call({**payload, "marked": True}, made.marks)
            return text, [(begin, end) for begin, end in places]
        indices = [i for i, message in enumerate(made.messages) if message["role"] == "assistant"]
        text, found = self._call({**payload, "answers": indices}, made.marks)
        out = []
        for common, whole, before, end in found:
            if before < 0 or end < 0:
                return text, None
            begin = common
            if not whole:  # the prompt goes on otherwise than the chat, as DeepSeek-R1's with <think>: from its last token on
                tokens = list(made.controls.places_of_template(text[before:common], made.marks))
                if not tokens:
                    return text, None
                begin = text.rindex(tokens[-1][1], before, common) + len(tokens[-1][1])
            out.append((begin, self._end(made, text, begin, end)))
        return text, out

    def _end(self, made: _Checked, text: str, begin: int, end: int) -> int:
        """Where an answer ends: behind the token that ends it, if only white space is between that and `end`."""
        kept = text[begin:end].rstrip()
        tokens = [token for _, token in made.controls.places_of_template(kept, made.marks)]
        ends = tokens and kept.endswith(tokens[-1]) and (tokens[-1] in _ENDS or tokens[-1] == self._tokenizer.eos_token)
        return begin + len(kept) if ends else end

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def _inspect(self, source: str) -> Mapping[str, Any]:
        found = self._inspected.get(source)
        if found is None:
            found = self._call({"template": source, "inspect": True, "variables": self._special}, None)
            self._inspected[source] = found
        return found

    def _options(self, options: Mapping[str, Any], tools: bool) -> dict[str, Any]:
        checked = check_json(options, "chat_template_kwargs") if options else {}
        known = self.variables(tools) if checked else frozenset()
        for name in checked:
            if name not in known:
                has = f"it has {', '.join(sorted(known))}" if known else "it has no options"
                raise RequestError(str(name), f"the model's chat template does not know it; {has}")
        return checked

    def _call(self, payload: Mapping[str, Any], marks: Marks | None) -> Any:
        try:
            return self._worker.call(payload)
        except JobError as error:
            reason = str(error)
            for mark in (marks.begin, marks.end, marks.edge) if marks else ():
                reason = reason.replace(mark, "")
            raise RequestError("messages", f"the model's chat template refuses them: {reason[:_MAX_SHOWN]}") from None
        except WorkerError as error:
            raise RequestError("messages", f"the model's chat template fails on them: {error}") from None

    def _system_span(
        self, edged: str, contents: list[str], encoded: Encoded, controls: ControlTokens, marks: Marks
    ) -> tuple[int, int] | None:
        """Where the first message ends in a prompt, with what the template puts behind it before the next one.

        Args:
            edged: the rendering with marks at the ends of strings.
            contents: of the first two messages, with those marks.
        """
        content = contents[0].strip()
        at = edged.find(content) if content else -1
        if at < 0 or encoded.begins is None:
            return None
        behind = at + len(content)
        text = controls.plain(edged[:behind], marks)
        following = edged.find(contents[1].strip(), behind) if len(contents) > 1 else len(edged)
        if following >= 0:
            layout = edged[behind:following]
            places = list(controls.places_of_template(layout, marks))
            ends = [at + len(token) for at, token in places if token in _ENDS or token == self._tokenizer.eos_token]
            end = ends[0] if ends else places[0][0] if places else 0
            text += controls.plain(layout, marks)[:end]
        if not encoded.text.startswith(text):
            return None
        return 0, bisect_left(encoded.begins, len(text))


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": write_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _whole(made: _Checked, mark: Callable[[Any, Marks], Any]) -> dict[str, Any]:
    """What a worker gets of a whole chat."""
    messages, tools = mark(made.messages, made.marks), mark(made.tools, made.marks)
    more = {"messages": messages, "tools": tools, "add_generation_prompt": False, "continue_final": False}
    return {**made.shared, **more}


def _hidden(messages: list[dict[str, Any]], text: str) -> list[int]:
    """Indices of messages whose content or reasoning is not in the text as a whole."""
    said = [(message["content"].strip(), message.get("reasoning_content", "").strip()) for message in messages]
    return [i for i, parts in enumerate(said) if any(part not in text for part in parts)]
