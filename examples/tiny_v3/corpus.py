"""Texts that every machine with Python has: the sources of its standard library, and the system's documents if there are any.

Every paragraph comes once: files repeat each other (licences, headers), and a held-out text that was also trained on would say
nothing. Tables of numbers are left out: they are long, and easy to predict.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENTS = (Path("/usr/share/doc"), Path("/usr/share/common-licenses"))
_LARGEST = 400_000  # bytes of a file; what is larger is a table or a log of changes
_NAMES = (".txt", ".md", ".rst", ".py")
_SHORTEST = 200  # characters of a document
_REPEATABLE = 60  # characters of a paragraph that may come again: ends of functions, headings


@dataclass(frozen=True)
class Corpus:
    """Texts, a file each, and those that are held out, of which no paragraph is in the others."""

    train: list[str]
    held_out: list[str]


def gather(limit: int | None = None, every: int = 40) -> Corpus:
    """
    Args:
        limit: characters that are enough; None: all there are.
        every: one file of so many is held out.
    """
    kept: dict[bool, list[str]] = {False: [], True: []}
    seen: set[bytes] = set()
    files = sorted(_files(), key=lambda file: hashlib.sha256(str(file).encode()).digest())  # mixed, the same way each time
    held = files[::every]
    for is_held, chosen in ((False, [f for i, f in enumerate(files) if i % every]), (True, held)):
        total = 0
        for file in chosen:
            text = _once(_read(file), seen)
            if len(text) >= _SHORTEST and not _is_table(text):
                kept[is_held].append(text)
                total += len(text)
            if limit is not None and total >= (limit // every if is_held else limit):
                break
    return Corpus(kept[False], kept[True])


def questions(texts: list[str], most: int) -> list[tuple[str, str]]:
    """What functions and classes of these sources do, as their docstrings say: (question, answer)."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # documents, and sources that lack a paragraph
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (answer := ast.get_docstring(node)):
                found.append((f"What does {node.name} do?", answer))
        if len(found) >= most:
            break
    return found[:most]


def _files() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in library.rglob("*.py"):
        if not {"site-packages", "dist-packages", "encodings", "idle_test"} & set(file.parts):
            yield file
    for folder in DOCUMENTS:
        for file in folder.rglob("*") if folder.is_dir() else ():
            if file.suffix in _NAMES or (file.suffix == "" and file.name.isupper()) or file.parent == DOCUMENTS[1]:
                yield file


def _read(file: Path) -> str:
    """The text, or nothing where it is none that can be read."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() and 0 < file.stat().st_size <= _LARGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _once(text: str, seen: set[bytes]) -> str:
    """The text without paragraphs that were seen before."""
    kept = []
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        key = hashlib.sha1(" ".join(paragraph.split()).encode(), usedforsecurity=False).digest()
        if len(paragraph) < _REPEATABLE or key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _is_table(text: str) -> bool:
    """Whether digits and marks outnumber letters."""
    letters = sum(map(str.isalpha, text))
    return letters < 0.5 * len(text.replace(" ", "").replace("\n", ""))
