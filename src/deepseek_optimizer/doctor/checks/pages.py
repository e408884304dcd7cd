"""Whether transparent huge pages are available."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..case import Case
from ..finding import Finding

NAME = "huge pages"
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


def check(case: Case) -> Iterator[Finding]:
    """The native arenas (cache, buffers) request huge pages, which need one TLB entry per 2 MiB instead of 512."""
    text = case.machine.read(_SETTING)
    setting = re.search(r"\[(\w+)\]", text)
    if setting is None:
        yield Finding(NAME, "note", "the system does not report whether it has transparent huge pages", facts={"setting": text})
    elif setting[1] == "never":
        yield Finding(
            NAME, "warning", "transparent huge pages are off", f"{_SETTING} is set to never, so all pages are 4 KiB",
            f"echo madvise | sudo tee {_SETTING}", {"setting": "never"},
        )  # fmt: skip
    else:
        yield Finding(NAME, "ok", f"transparent huge pages: {setting[1]}", facts={"setting": setting[1]})
