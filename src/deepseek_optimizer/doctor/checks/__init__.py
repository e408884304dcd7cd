"""The checks, one per file: each has a `NAME` and `check(case)`, which yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..case import Case
from ..finding import Finding
from . import checkpoint, environment, features, memory, native, pages, threads, tokenizer, versions

Check = Callable[[Case], Iterator[Finding]]

OF_THE_MACHINE: Mapping[str, Check] = {m.NAME: m.check for m in (versions, native, features, threads, environment, pages)}
# The first is a precondition of the others: they need a checkpoint that can be opened.
OF_THE_MODEL: Mapping[str, Check] = {m.NAME: m.check for m in (checkpoint, tokenizer, memory)}
