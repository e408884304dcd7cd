"""Converts regular expressions to grammars with bounded step times: one rule per state of a deterministic automaton.

xgrammar's own conversions are either wrong for repetitions in alternatives (0.2.8, in JSON schemas: `(a{0,3}|a)` accepts any
number of a) or follow every possible parse of a text, of which there may be too many. Here every text has a single parse.

Where dialects differ, the grammar accepts what all of them accept: the whole text must match, and negated shorthands such as
\\D match ASCII characters only.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

_MAX_DEPTH, _LAST = 50, 0x10FFFF
_MAX_NODES, _MAX_STATES, _MAX_EDGES = 4_000, 1_000, 100_000  # limits of the automata, and of the work to construct one
_NO_TEXT = ((0, 0), (0xD800, 0xDFFF))
_ESCAPED = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))  # characters not written literally in a JSON string
_SHORTHANDS = {"d": ((48, 57),), "w": ((48, 57), (65, 90), (95, 95), (97, 122)), "s": ((9, 13), (32, 32))}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_COUNT = re.compile(r"\{(\d{1,5})(,(\d{0,5}))?\}")
Ranges = list[tuple[int, int]]
Node = tuple[Any, ...]  # ("chars", ranges), ("all", nodes), ("any", nodes), ("repeat", node, low, high or None)


def to_rules(pattern: str, name: str, *, json_string: bool) -> str:
    """Converts a regular expression to EBNF rules, the first of which is `name`.

    Args:
        pattern: regular expression.
        name: name of the first rule and prefix of all other rules' names; must be unique.
        json_string: the text is inside the quotes of a JSON string. Characters that JSON must escape are removed from classes,
            and escaped where they are literals.

    Raises:
        ValueError: the pattern is not a regular expression, is not supported, or is too large.
    """
    reader = _Reader(pattern, json_string)
    node = reader.alternatives(0)
    if reader.at < len(pattern):
        reader.fail("unmatched closing parenthesis")
    automaton = _Automaton()
    end = automaton.add(node, 0)
    names = [name] + [f"{name}_{i}" for i in range(1, _MAX_STATES)]
    lines = []
    for state, (edges, accepts) in enumerate(automaton.deterministic(end)):
        parts = [f"[{_class_text(ranges)}] {names[target]}" for target, ranges in edges.items()] + ['""'] * accepts
        lines.append(f"{names[state]} ::= {' | '.join(parts)}")
    return "\n".join(lines)


class _Reader:
    """Recursive descent parser of a pattern.

    Args:
        pattern: regular expression.
        json_string: see `to_rules`.
    """

    def __init__(self, pattern: str, json_string: bool) -> None:
        self.text, self.at, self._json = pattern, 0, json_string

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{message}, at character {self.at}")

    def alternatives(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            self.fail("groups are nested too deeply")
        out = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            out.append(self._sequence(depth))
        return "any", out

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        if self.at >= len(self.text):
            self.fail("unexpected end of the pattern")
        self.at += 1
        return self.text[self.at - 1]

    def _sequence(self, depth: int) -> Node:
        """Parses up to a bar, a closing parenthesis or the end. Anchors are allowed only at the ends of outermost sequences."""
        parts: list[Node] = []
        if depth == 0 and self._peek() == "^":
            self.at += 1
        while (character := self._peek()) and character not in "|)":
            if character == "$" and depth == 0 and self.text[self.at + 1 : self.at + 2] in ("", "|"):
                self.at += 1
                break
            parts.append(self._repeated(self._atom(depth)))
        return "all", parts

    def _atom(self, depth: int) -> Node:
        character = self._next()
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._class()
        if character == ".":
            return self._of(_without([(0, _LAST)], [(10, 10), (13, 13), (0x2028, 0x2029)]))
        if character == "\\":
            escaped = self._escape()
            return self._literal(escaped) if isinstance(escaped, str) else self._of(escaped)
        if character in "*+?{}]^$":
            self.fail(f"{character} is not allowed here")
        return self._literal(character)

    def _group(self, depth: int) -> Node:
        named = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>)").match(self.text, self.at)
        if named:
            self.at = named.end()
        elif self._peek() == "?":
            self.fail("Lookahead, lookbehind and flags can't be enforced")
        out = self.alternatives(depth + 1)
        if self._peek() != ")":
            self.fail("a parenthesis is not closed")
        self.at += 1
        return out

    def _repeated(self, atom: Node) -> Node:
        counted = _COUNT.match(self.text, self.at)
        if counted:
            self.at = counted.end()
            low = int(counted[1])
            high = low if counted[2] is None else int(counted[3]) if counted[3] else None
            if high is not None and high < low:
                self.fail("the upper bound of a repetition is below its lower bound")
        elif self._peek() and self._peek() in "*+?":
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self._next()]
        else:
            return atom
        if self._peek() == "?":  # lazy: no difference when the whole text must match
            self.at += 1
        if self._peek() and self._peek() in "*+{":
            self.fail("a repetition can't be repeated")
        return "repeat", atom, low, high

    def _escape(self) -> str | Ranges:
        """Parses the rest of an escape after the backslash: a character, or ranges of characters."""
        character = self._next()
        if character in _SHORTHANDS:
            return list(_SHORTHANDS[character])
        if character.lower() in _SHORTHANDS:
            return _without([(0, 127)], list(_SHORTHANDS[character.lower()]))
        if character in _CONTROLS:
            return _CONTROLS[character]
        if character in "xu":
            digits = self.text[self.at : self.at + (2 if character == "x" else 4)]
            if len(digits) != (2 if character == "x" else 4) or not set(digits) <= set(string.hexdigits):
                self.fail("an escape has too few digits")
            self.at += len(digits)
            return chr(int(digits, 16))
        if character.isalnum():
            self.fail(f"\\{character} can't be enforced")
        return character

    def _class(self) -> Node:
        negated = self._peek() == "^"
        self.at += negated
        ranges: Ranges = []
        shorthand = False
        first = True
        while (character := self._next()) != "]" or first:
            first = False
            low = self._escape() if character == "\\" else character
            if not isinstance(low, str):
                ranges += low
                shorthand = True
                continue
            high = low
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                character = self._next()
                end = self._escape() if character == "\\" else character
                if not isinstance(end, str) or end < low:
                    self.fail("a range of characters has no end, or ends before it begins")
                high = end
            ranges.append((ord(low), ord(high)))
        if negated:
            ranges = _without([(0, 127 if shorthand else _LAST)], ranges)
        return self._of(ranges)

    def _of(self, ranges: Ranges) -> Node:
        """Returns the node for one character of a class."""
        allowed = _without(ranges, [*_NO_TEXT, *(_ESCAPED if self._json else ())])
        if not allowed:
            self.fail("no character of this class can be written in the text without an escape")
        return "chars", allowed

    def _literal(self, character: str) -> Node:
        written = json.dumps(character, ensure_ascii=False)[1:-1] if self._json else character
        if not written.isascii() or not self._json:
            return self._of([(ord(character), ord(character))])
        return "all", [("chars", [(ord(c), ord(c))]) for c in written]


class _Automaton:
    """A nondeterministic automaton; node 0 is the start."""

    def __init__(self) -> None:
        self._edges: list[list[tuple[int, int, int]]] = [[]]  # for each node: (first character, last, target)
        self._free: list[list[int]] = [[]]  # for each node: targets of edges without a character

    def _new(self) -> int:
        if len(self._edges) == _MAX_NODES:
            raise ValueError("the pattern is too large; use fewer repetitions")
        self._edges.append([])
        self._free.append([])
        return len(self._edges) - 1

    def add(self, node: Node, begin: int) -> int:
        """Adds a node of the expression, starting at node `begin` of the automaton; returns the node where it ends."""
        kind = node[0]
        if kind == "chars":
            end = self._new()
            self._edges[begin] += [(low, high, end) for low, high in node[1]]
            return end
        if kind == "all":
            for part in node[1]:
                begin = self.add(part, begin)
            return begin
        if kind == "any":
            end = self._new()
            for part in node[1]:
                first = self._new()
                self._free[begin].append(first)
                self._free[self.add(part, first)].append(end)
            return end
        _, inner, low, high = node
        for _ in range(low):
            begin = self.add(inner, begin)
        end = self._new()
        if high is None:  # a loop with its own nodes
            first = self._new()
            self._free[begin].append(first)
            self._free[first].append(end)
            self._free[self.add(inner, first)].append(first)
            return end
        for _ in range(high - low):
            self._free[begin].append(end)
            begin = self.add(inner, begin)
        self._free[begin].append(end)
        return end

    def _closure(self, nodes: Iterable[int]) -> frozenset[int]:
        reached, todo = set(nodes), list(nodes)
        while todo:
            for node in self._free[todo.pop()]:
                if node not in reached:
                    reached.add(node)
                    todo.append(node)
        return frozenset(reached)

    def deterministic(self, end: int) -> list[tuple[dict[int, Ranges], bool]]:
        """Converts to a deterministic automaton; returns (target -> ranges of characters, whether it accepts) of each state."""
        states = {self._closure([0]): 0}
        out: list[tuple[dict[int, Ranges], bool]] = []
        todo, work = list(states), 0
        for state in todo:  # grows meanwhile
            edges = [edge for node in state for edge in self._edges[node]]
            work += len(edges) + len(state)
            targets: dict[int, Ranges] = {}
            for low, high, nodes in _disjoint(edges):
                reached = self._closure(nodes)
                work += len(reached)
                if reached not in states:
                    states[reached] = len(states)
                    todo.append(reached)
                targets.setdefault(states[reached], []).append((low, high))
                if len(states) > _MAX_STATES or work > _MAX_EDGES:
                    raise ValueError("the pattern is too large; use fewer repetitions and alternatives")
            out.append((targets, end in state))
        return out


def _disjoint(edges: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, frozenset[int]]]:
    """Yields disjoint ranges with all targets of each."""
    starts: dict[int, list[int]] = {}
    stops: dict[int, list[int]] = {}
    for low, high, node in edges:
        starts.setdefault(low, []).append(node)
        stops.setdefault(high + 1, []).append(node)
    active: Counter[int] = Counter()
    points = sorted({*starts, *stops})
    for low, beyond in zip(points, points[1:], strict=False):
        active.update(starts.get(low, ()))
        active.subtract(stops.get(low, ()))
        nodes = frozenset(node for node, count in active.items() if count > 0)
        if nodes:
            yield low, beyond - 1, nodes


def _without(ranges: Ranges, taken: Ranges) -> Ranges:
    """Returns `ranges` without the characters in `taken`, in ascending order."""
    out: Ranges = []
    for low, high in _merged(ranges):
        for t_low, t_high in _merged(taken):
            if t_high < low or t_low > high:
                continue
            if t_low > low:
                out.append((low, t_low - 1))
            low = t_high + 1
        if low <= high:
            out.append((low, high))
    return out


def _merged(ranges: Ranges) -> Ranges:
    out: Ranges = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], high)
        else:
            out.append((low, high))
    return out


def _code(point: int) -> str:
    character = chr(point)
    return character if character.isascii() and character.isalnum() else f"\\U{point:08x}"


def _class_text(ranges: Ranges) -> str:
    return "".join(f"{_code(low)}-{_code(high)}" if low < high else _code(low) for low, high in _merged(ranges))
