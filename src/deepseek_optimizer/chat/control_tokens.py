"""Text of people never becomes a control token of the model.

A chat template turns messages into one text in which control tokens, such as `<|im_start|>` or `<｜User｜>`, say who speaks.
Whoever may write them in a message could speak as someone else. So occurrences of such tokens in a message are marked before
the template sees them, with random digits that nobody can guess and that templates leave alone; behind the template, what is
marked is encoded as ordinary text, and every other occurrence is the template's own.

Text without such tokens is not touched, so its ids are what `apply_chat_template` gives. Text that becomes a control token only
when a template joins it with its neighbours is found by comparing with a second rendering, whose strings have marks at their
ends. (A template that itself changes letters of a message into such a token is beyond this; none is known.)
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

_COMPARED = ("role", "type")
_TAGS = {f"<{end}{name}>" for end in ("", "/") for name in ("think", "tool_call", "tool_response", "tools")}
_TAG = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class Marks:
    """Random marks of one rendering: around a control token, and at a string's ends."""

    def __init__(self) -> None:
        digits = secrets.randbelow(10**30)
        self.begin, self.end, self.edge = (f"{k}{digits:030d}{k}" for k in (7, 8, 9))


@dataclass(frozen=True)
class Encoded:
    """A rendered text without marks: its token ids, and where in it each token begins (None: the tokenizer can't tell)."""

    text: str
    ids: list[int]
    begins: list[int] | None


class ControlTokens:
    """
    Args:
        tokenizer: of Transformers.
        template: its chat template; tokens that stand in it count, also where the tokenizer does not call them special.
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
        # Put before pieces that are not the first, and taken away again, where the tokenizer would begin them with a space.
        self._newline: list[int] = []
        if first and str(first[0]).startswith("▁"):
            self._newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy of JSON with the control tokens in its strings and keys marked."""
        mark = partial(self._marked, marks=marks)
        return _map_strings(value, mark, mark)

    def mark_edges(self, value: Any, marks: Marks) -> Any:
        """The same of messages or tools, with marks also at the ends of strings, inside of white space, which templates strip.

        Keys and values that templates compare have none.
        """

        def mark(text: str) -> str:
            body = text.strip()
            if not body:
                return text
            before, _, after = text.partition(body)
            return f"{before}{marks.edge}{self._marked(body, marks)}{marks.edge}{after}"

        return _map_strings(value, mark, partial(self._marked, marks=marks))

    def _marked(self, text: str, marks: Marks) -> str:
        return self._any.sub(lambda found: f"{marks.begin}{found.group()}{marks.end}", text)

    def of_template(self, text: str, marks: Marks) -> list[str]:
        """The control tokens of a rendered text that are the template's own."""
        return [token for marked, piece in self._split(text, marks) if not marked for token in self._any.findall(piece)]

    def places_of_template(self, text: str, marks: Marks) -> Iterator[tuple[int, str]]:
        """(where in the text without marks, which) of these tokens."""
        at = 0
        for marked, piece in self._split(text, marks):
            for found in () if marked else self._any.finditer(piece):
                yield at + found.start(), found.group()
            at += len(piece)

    def plain(self, text: str, marks: Marks) -> str:
        """A rendered text without marks."""
        return "".join(piece for _, piece in self._split(text, marks))

    def encode(self, text: str, marks: Marks, first: bool = True) -> Encoded:
        """Token ids of a rendered text.

        Args:
            first: nothing stands before it.

        Raises:
            RequestError: a message has characters that only the tokenizer makes into a control token.
        """
        pieces = [part for marked, piece in self._split(text, marks) for part in (self._broken(piece) if marked else [piece])]
        tokens = self._tokenize(pieces, first)
        ids: list[int] = []
        begins: list[int] = []
        length = 0
        for i, piece in enumerate(pieces):
            new, offsets = tokens[piece, first and i == 0]
            ids += new
            begins += [length + at for at in offsets]
            length += len(piece)
        return Encoded("".join(pieces), ids, begins if self._tokenizer.is_fast else None)

    def _split(self, text: str, marks: Marks) -> Iterator[tuple[bool, str]]:
        """(whether it is a marked token, text), none empty. Marks that lost their partner only break the text."""
        at = 0
        for found in re.finditer(f"{marks.begin}({self._any.pattern}){marks.end}|{marks.begin}|{marks.end}|{marks.edge}", text):
            if found.start() > at:
                yield False, text[at : found.start()]
            if found.group(1):
                yield True, found.group(1)
            at = found.end()
        if at < len(text):
            yield False, text[at:]

    def _tokenize(self, pieces: Sequence[str], first: bool) -> dict[tuple[str, bool], tuple[list[int], list[int]]]:
        """(piece, whether it is the first) -> its ids, and where they begin in it; in one call, since there may be many."""
        keys = sorted({(piece, first and i == 0) for i, piece in enumerate(pieces)})
        cut = len(self._newline)
        texts = [piece if leads or not cut else "\n" + piece for piece, leads in keys]
        if not texts:
            return {}
        fast = self._tokenizer.is_fast
        batch = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        out = {}
        for i, (piece, leads) in enumerate(keys):
            ids, begins = batch["input_ids"][i], [begin for begin, _ in batch["offset_mapping"][i]] if fast else []
            if cut and not leads:
                if ids[:cut] == self._newline:
                    ids, begins = ids[cut:], [at - 1 for at in begins[cut:]]
                else:  # the newline became part of the first token
                    ids, begins = self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], []
            expected = Counter(self._ids[token] for token in self._any.findall(piece))
            if Counter(i for i in ids if i in self._controls) - expected:
                raise RequestError("messages", "has characters that the tokenizer makes into one of the model's control tokens")
            out[piece, leads] = ids, begins
        return out

    def _broken(self, token: str) -> Iterable[str]:
        """A control token in pieces that have none."""
        rest = token[1:]
        return list(token) if self._any.search(rest) else [token[:1], rest]


def _is_control(token: str, template: str) -> bool:
    """Whether a token that is not called special is one all the same, as DeepSeek's `<｜User｜>` and Qwen's `<tool_call>`."""
    tag = len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))
    return tag and (token in template or token in _TAGS or _TAG.fullmatch(token) is not None)


def _longest_of(strings: Iterable[str]) -> str:
    """A regular expression for the longest of the strings, as a tree of their beginnings: no character is tried twice."""
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
    """A copy of JSON with changed strings.

    Args:
        change: strings.
        name: keys, and strings under the keys of _COMPARED.
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
