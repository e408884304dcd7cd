"""Token ids to text, as they come: pieces that concatenate to exactly what decoding all of them at once gives."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a character whose bytes are not all there yet


class TextStream:
    """A streamer for `generate(streamer=...)`: skips the prompt, writes text, notes when each token came.

    A piece is held back while it ends in an incomplete character, so that an emoji split over tokens comes out whole. Decoding
    starts at the last piece written, not at the last token: tokenizers drop a leading space at the start of a text.

    Args:
        tokenizer: has `decode`.
        write: takes each piece of text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.times: list[float] = []  # perf_counter seconds, one a generated token
        self.text = ""
        self._prompt_seen = False
        self._start = self._written = 0  # ids[start:written] are out, and are the context that ids[written:] are decoded in

    def put(self, value: Any) -> None:
        """The prompt first (ignored), then each token: a tensor of shape [1], or [n] where several are accepted at once."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = value.reshape(-1).tolist()
        self.ids += ids
        self.times += [time.perf_counter()] * len(ids)
        self._emit(final=False)

    def end(self) -> None:
        """Writes what was held back."""
        self._emit(final=True)

    def _emit(self, final: bool) -> None:
        before = self._decode(self.ids[self._start : self._written])
        text = self._decode(self.ids[self._start :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not final):
            return
        self._start, self._written = self._written, len(self.ids)
        self.text += text[len(before) :]
        self.write(text[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def write_now(text: str) -> None:
    """A piece of text on stdout, at once: what a terminal passes as `write`. What a model says does not steer the terminal."""
    sys.stdout.write(_CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
