"""Whether the system gives huge pages to those who ask."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..case import Case
from ..finding import Finding

NAME = "huge pages"
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


def check(case: Case) -> Iterator[Finding]:
    """The native arenas (cache, buffers) ask for huge pages: 2 MiB of them need one entry of the TLB instead of 512."""
    text = case.machine.read(_SETTING)
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        yield Finding(NAME, "note", "the system doesn't say whether it has transparent huge pages", facts={"setting": text})
    elif chosen[1] == "never":
        yield Finding(
            NAME, "warning", "transparent huge pages are off", f"{_SETTING} is set to never, so memory comes in pages of 4 KiB",
            f"echo madvise | sudo tee {_SETTING}", {"setting": "never"},
        )  # fmt: skip
    else:
        yield Finding(NAME, "ok", f"transparent huge pages: {chosen[1]}", facts={"setting": chosen[1]})
