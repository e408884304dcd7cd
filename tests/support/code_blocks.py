"""The code blocks of the documentation: extracted from Markdown, and run page by page as a reader would type them.

A comment before a block says how to run it:

    <!-- not tested: REASON -->     it cannot run here
    <!-- tested: slow -->           it runs with the slow tests only
    <!-- file: NAME -->             its text is written to that file
    <!-- stdin: TEXT -->            the input of its command
    <!-- training -->               a few steps are enough: `STEPS` are added to `dso train`
    <!-- fixture: packed NAME -->   needs a packed model of that name
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = ("--steps", "4", "--max-length", "256")
ADDRESS = "127.0.0.1:8000"  # the server's address in the documentation
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- ([^<>]*) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. `marks`: the comments before it, by their first words."""

    page: str
    line: int
    language: str
    text: str
    marks: Mapping[str, str]

    @property
    def slow(self) -> bool:
        return self.marks.get("tested") == "slow"

    def commands(self) -> list[str]:
        """The commands of a console block: the lines that begin with $, with their continuation lines."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def blocks(path: Path, root: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = path.read_text(encoding="utf-8")
    result = []
    for fence in _FENCE.finditer(text):
        marks, before = {}, text[: fence.start()]
        while comment := _COMMENT.search(before):
            name, _, value = comment[1].partition(":")
            marks[name.strip()] = value.strip()
            before = before[: comment.start()]
        line = text.count("\n", 0, fence.start()) + 1
        result.append(Block(str(path.relative_to(root)), line, fence[1], fence[2], marks))
    return result


@dataclass
class Session:
    """Runs one page's blocks, which share a folder, Python's names and a server.

    Attributes:
        folder: where commands run.
        names: text in the documentation -> its replacement, such as a hub name -> a path.
        invoke: runs `dso` in this process: invoke(arguments, input) -> a result of typer's CliRunner.
        serve: starts the server that a `dso serve` line describes, and returns its host and port.
    """

    folder: Path
    names: Mapping[str, str]
    invoke: Callable[[list[str], str | None], Any]
    serve: Callable[[list[str]], str]
    python: dict[str, Any] = field(default_factory=dict)
    address: str = ADDRESS

    def run(self, block: Block) -> None:
        """Raises the block's error, or AssertionError if a command fails, with the place in the documentation."""
        try:
            with contextlib.chdir(self.folder) if hasattr(contextlib, "chdir") else _chdir(self.folder):
                self._run(block)
        except Exception as error:
            raise AssertionError(f"{block.page}:{block.line}: {type(error).__name__}: {error}") from error

    def _run(self, block: Block) -> None:
        text = self._substituted(block.text)
        if "file" in block.marks:
            Path(block.marks["file"]).write_text(text, encoding="utf-8")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, f"{block.page}:{block.line}", "exec"), self.python)
        elif block.language == "console":
            for command in block.commands():
                self._command(command, block)

    def _command(self, command: str, block: Block) -> None:
        words = shlex.split(self._substituted(command))
        if words[0] != "dso" or {"|", "&&", ";"} & set(words):
            line = re.sub(r"^curl ", "curl --silent --fail-with-body ", self._substituted(command))
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, cwd=self.folder)
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            return
        words, target = (words[:-2], words[-1]) if ">" in words else (words, None)
        words, source = (words[:-2], words[-1]) if "<" in words else (words, None)
        if words[1] == "serve":
            self.address = self.serve(words[1:])
            return
        if "training" in block.marks:
            words += STEPS
        typed = f"{block.marks['stdin']}\n" if "stdin" in block.marks else None
        result = self.invoke(words[1:], Path(source).read_text(encoding="utf-8") if source else typed)
        assert result.exit_code in _codes(words), f"{command}: exit code {result.exit_code}\n{result.output[-2000:]}"
        if target is not None:
            Path(target).write_text(result.stdout, encoding="utf-8")

    def _substituted(self, text: str) -> str:
        for name, other in {**self.names, ADDRESS: self.address}.items():
            text = text.replace(name, other)
        return text


def _codes(words: list[str]) -> tuple[int, ...]:
    """The accepted exit codes. The doctor's is 1 if it finds a problem, as with a model of random weights."""
    return (0, 1) if words[1] == "doctor" else (0,)


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
