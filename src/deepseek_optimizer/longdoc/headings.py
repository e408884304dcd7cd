"""Where headings begin: chapters of Markdown, definitions of source code."""

from __future__ import annotations

import re
from os.path import splitext

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HASHES = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_UNDERLINE = re.compile(r" {0,3}(?:={2,}|-{2,})[ \t]*$")
_DEFINITION = re.compile(r"\n[^\S\n]*\n(?=[^\s})\]])")
_MARKDOWN = frozenset(".md .markdown .mdown .mkd .qmd .rmd".split())
_SOURCE = frozenset(
    ".c .cc .cjs .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f .f90 .fs .go .gradle .groovy .h .hpp .hs "
    ".hxx .java .jl .js .jsx .kt .kts .lisp .lua .m .mjs .ml .mli .mm .nim .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb "
    ".rs .s .scala .scm .scss .sh .sql .swift .tcl .tf .ts .tsx .v .vb .vhd .vue .zig".split()
)


def headings_of(name: str, text: str) -> tuple[int, ...]:
    """By the ending of a file's name: of Markdown and source code; none of other text."""
    ending = splitext(name)[1].lower()
    if ending in _MARKDOWN:
        return markdown_headings(text)
    return source_headings(text) if ending in _SOURCE else ()


def markdown_headings(text: str) -> tuple[int, ...]:
    """Lines that begin with "#", and those that are underlined with "=" or "-", outside fenced code (CommonMark 4.2, 4.3)."""
    found: list[int] = []
    fence, at, before = "", 0, ""
    for bare in text.split("\n"):
        length = len(bare) + 1
        mark = _FENCE.match(bare)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not bare.strip().strip(fence[0]) else fence
            bare = ""
        elif mark:
            fence, bare = mark[1], ""
        elif _HASHES.match(bare):
            found.append(at)
            bare = ""
        elif before.strip() and _UNDERLINE.match(bare):
            found.append(at - len(before) - 1)
            bare = ""
        before, at = bare, at + length
    return tuple(found)


def source_headings(text: str) -> tuple[int, ...]:
    """Lines behind a blank line that are neither indented nor close something: in most languages, that is where functions,
    classes and sections begin, or the comments on them."""
    return tuple(match.end() for match in _DEFINITION.finditer(text))
