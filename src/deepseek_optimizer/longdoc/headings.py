"""Start positions of headings: chapters in Markdown, definitions in source code."""

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
    """Headings of Markdown and source code, recognized by the file extension; none for other text."""
    ending = splitext(name)[1].lower()
    if ending in _MARKDOWN:
        return markdown_headings(text)
    return source_headings(text) if ending in _SOURCE else ()


def markdown_headings(text: str) -> tuple[int, ...]:
    """Lines that start with "#" or are underlined with "=" or "-", outside fenced code (CommonMark 4.2, 4.3)."""
    positions: list[int] = []
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
            positions.append(at)
            bare = ""
        elif before.strip() and _UNDERLINE.match(bare):
            positions.append(at - len(before) - 1)
            bare = ""
        before, at = bare, at + length
    return tuple(positions)


def source_headings(text: str) -> tuple[int, ...]:
    """Lines after a blank line that are neither indented nor start with a closing bracket: in most languages, functions,
    classes and sections, or their comments, start there."""
    return tuple(match.end() for match in _DEFINITION.finditer(text))
