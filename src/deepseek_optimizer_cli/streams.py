"""Text in and out of the commands where the locale can't hold it."""

from __future__ import annotations

import codecs
import os
import sys
from io import TextIOWrapper


def tolerate_locale() -> None:
    """Characters that the terminal's encoding lacks are written as escapes, where they would end the program otherwise.

    A locale that names no encoding (C, POSIX) makes Python take UTF-8 by itself (PEP 540). Where that was turned off
    (PYTHONUTF8=0), arguments and names of files are no text that a tokenizer could read, so the command starts again with it.
    """
    if not sys.flags.utf8_mode and codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        os.environ["PYTHONUTF8"] = "1"  # for processes of its own
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
