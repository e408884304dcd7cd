"""Prevents text in messages from becoming control tokens of the model (prompt injection).

A chat template turns messages into one text in which control tokens, such as `<|im_start|>` or `<｜User｜>`, mark the roles. A
user who could write them in a message could impersonate another role. So occurrences of control tokens in a message are marked
before rendering, with random digits that cannot be guessed and that templates do not change; after rendering, marked
occurrences are encoded as ordinary text, and all others are the template's own.

Text without control tokens is unchanged, so its ids are the same as from `apply_chat_template`. Text that becomes a control
token only when the template joins it with adjacent text is detected by a second rendering with marks at the ends of all
strings. (A template that itself turns letters of a message into a control token is not covered; none is known.)
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import RequestError

_COMPARED = ("role", "type", "id", "tool_call_id")
_TAGS = {f"<{end}{name}>" for end in ("", "/") for name in ("think", "tool_call", "tool_response", "tools")}
_TAG = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class Marks:
    """The random marks of one rendering: around control tokens, and at the ends of strings."""

    def __init__(self) -> None:
        digits = secrets.randbelow(10**30)
        self.begin, self.end, self.edge = (f"{k}{digits:030d}{k}" for k in (7, 8, 9))


@dataclass(frozen=True)
class Encoded:
    """A rendered text without marks, its token ids, and the position of each token in it (None: the tokenizer has no
    offsets)."""

    text: str
    ids: list[int]
    begins: list[int] | None


class ControlTokens:
    """
    Args:
        tokenizer: of Transformers.
        template: its chat template; tokens that occur in it count even if the tokenizer does not mark them as special.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._ids = {
            token.content: id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or _is_control(token.content, template)
        }
        self._controls = frozenset(self._ids.values()) - {tokenizer.unk_token_id}
        self._any = re.compile(_longest_of(self._ids))
        first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
        # Put before segments other than the first, and removed again, if the tokenizer would add a space before them.
        self._newline: list[int] = []
        if first and str(first[0]).startswith("▁"):
            self._newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy of a JSON value with the control tokens in its strings and keys marked."""
        mark = partial(self._marked, marks=marks)
        return _map_strings(value, mark, mark)

    def mark_edges(self, value: Any, marks: Marks) -> Any:
        """Like `mark`, with marks also at the ends of strings, inside surrounding white space, which templates strip.

        Keys, and values that templates compare, have no marks at their ends.
        """

        def mark(text: str) -> str:
            body = text.strip()
            if not body:
                return text
            before, _, after = text.partition(body)
            return f"{before}{marks.edge}{self._marked(body, marks)}{marks.edge}{after}"

        return _map_strings(value, mark, partial(self._marked, marks=marks))

    def _marked(self, text: str, marks: Marks) -> str:
        return self._any.sub(lambda match: f"{marks.begin}{match.group()}{marks.end}", text)

    def of_template(self, text: str, marks: Marks) -> list[str]:
        """The control tokens of a rendered text that are the template's own."""
        return [token for marked, segment in self._split(text, marks) if not marked for token in self._any.findall(segment)]

    def places_of_template(self, text: str, marks: Marks) -> Iterator[tuple[int, str]]:
        """(position in the text without marks, token) of each of these tokens."""
        at = 0
        for marked, segment in self._split(text, marks):
            for match in () if marked else self._any.finditer(segment):
                yield at + match.start(), match.group()
            at += len(segment)

    def plain(self, text: str, marks: Marks) -> str:
        """A rendered text without marks."""
        return "".join(segment for _, segment in self._split(text, marks))

    def encode(self, text: str, marks: Marks, first: bool = True) -> Encoded:
        """Token ids of a rendered text.

        Args:
            first: whether it is at the start of the prompt.

        Raises:
            RequestError: a message contains characters that the tokenizer itself turns into a control token.
        """
        split = self._split(text, marks)
        segments = [part for marked, segment in split for part in (self._broken(segment) if marked else [segment])]
        tokens = self._tokenize(segments, first)
        ids: list[int] = []
        begins: list[int] = []
        length = 0
        for i, segment in enumerate(segments):
            new, offsets = tokens[segment, first and i == 0]
            ids += new
            begins += [length + at for at in offsets]
            length += len(segment)
        return Encoded("".join(segments), ids, begins if self._tokenizer.is_fast else None)

    def _split(self, text: str, marks: Marks) -> Iterator[tuple[bool, str]]:
        """(whether it is a marked token, text) in order, none empty. Unpaired marks only split the text."""
        at = 0
        for match in re.finditer(f"{marks.begin}({self._any.pattern}){marks.end}|{marks.begin}|{marks.end}|{marks.edge}", text):
            if match.start() > at:
                yield False, text[at : match.start()]
            if match.group(1):
                yield True, match.group(1)
            at = match.end()
        if at < len(text):
            yield False, text[at:]

    def _tokenize(self, segments: Sequence[str], first: bool) -> dict[tuple[str, bool], tuple[list[int], list[int]]]:
        """(segment, whether it is the first) -> its ids and their positions in it; in one call, since there may be many."""
        keys = sorted({(segment, first and i == 0) for i, segment in enumerate(segments)})
        cut = len(self._newline)
        texts = [segment if leads or not cut else "\n" + segment for segment, leads in keys]
        if not texts:
            return {}
        fast = self._tokenizer.is_fast
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        out = {}
        for i, (segment, leads) in enumerate(keys):
            ids, begins = batch["input_ids"][i], [begin for begin, _ in batch["offset_mapping"][i]] if fast else []
            if cut and not leads:
                if ids[:cut] == self._newline:
                    ids, begins = ids[cut:], [at - 1 for at in begins[cut:]]
                else:  # the newline became part of the first token
                    ids, begins = self._tokenizer(segment, add_special_tokens=False, verbose=False)["input_ids"], []
            expected = Counter(self._ids[token] for token in self._any.findall(segment))
            if Counter(i for i in ids if i in self._controls) - expected:
                raise RequestError(
                    "messages",
                    "contains characters that the tokenizer turns into one of the model's control tokens; remove them",
                )
            out[segment, leads] = ids, begins
        return out

    def _broken(self, token: str) -> Iterable[str]:
        """A control token split so that no part contains one."""
        rest = token[1:]
        return list(token) if self._any.search(rest) else [token[:1], rest]


def _is_control(token: str, template: str) -> bool:
    """Whether a token not marked as special is a control token, such as DeepSeek's `<｜User｜>` and Qwen's `<tool_call>`."""
    tag = len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))
    return tag and (token in template or token in _TAGS or _TAG.fullmatch(token) is not None)


def _longest_of(strings: Iterable[str]) -> str:
    """A regular expression that matches the longest of the strings, built as a prefix tree to avoid backtracking."""
    tree: dict[str, Any] = {}
    for string in strings:
        node = tree
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}
    return _expression(tree) if tree else "(?!)"


def _expression(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _expression(rest) for character, rest in node.items() if character]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def _map_strings(value: Any, change: Callable[[str], str], name: Callable[[str], str]) -> Any:
    """A copy of a JSON value with its strings mapped.

    Args:
        change: applied to strings.
        name: applied to keys, and to strings under the keys of _COMPARED.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            name(key): name(item) if key in _COMPARED and isinstance(item, str) else _map_strings(item, change, name)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_map_strings(item, change, name) for item in value]
    return value
