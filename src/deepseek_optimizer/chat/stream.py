"""Incremental detokenization: the emitted text concatenates to exactly the text of decoding all tokens at once."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_INCOMPLETE = "\ufffd"  # decoded for a character whose bytes are incomplete


class TextStream:
    """A streamer for `generate(streamer=...)`: skips the prompt, writes text, records the time of each token.

    Text is held back while it ends in an incomplete character, so that an emoji split over several tokens is written whole.
    Decoding starts at the last text written, not at the last token: tokenizers drop a leading space at the start of a text.

    Args:
        tokenizer: has `decode`.
        write: called with each new text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.times: list[float] = []  # perf_counter seconds, one per generated token
        self.text = ""
        self._prompt_seen = False
        self._start = self._written = 0  # ids[start:written] are written, and are the context to decode ids[written:]

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
        """Writes the text held back."""
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
    """Writes text to stdout without buffering. On a terminal, control characters are removed, so that a model cannot control
    it."""
    sys.stdout.write(_CONTROLS.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
