"""Input and output of text that the locale's encoding cannot represent."""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper


def tolerate_locale() -> None:
    """Writes characters outside the terminal's encoding as escapes instead of raising; undecodable input becomes U+FFFD.

    In a locale without an encoding (C, POSIX) Python uses UTF-8 on its own (PEP 540). If that is disabled (PYTHONUTF8=0),
    arguments and file names are not valid text for a tokenizer, so the command restarts itself in UTF-8 mode.
    """
    if not sys.flags.utf8_mode and codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"  # for child processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
