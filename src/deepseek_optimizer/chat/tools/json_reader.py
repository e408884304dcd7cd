"""Finds the end of a JSON object in a stream of text."""

from __future__ import annotations


class JsonReader:
    """Finds the end of a JSON object, and passes its text through. `ended`: whether the text had its closing brace."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.ended = False
        self.inside = True

    def feed(self, text: str) -> tuple[str, str]:
        """(text of the object, text after it)."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return text[: at + 1], text[at + 1 :]
        return text, ""

    def close(self) -> str:
        """Text that completes the object."""
        return ""
