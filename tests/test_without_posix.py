"""The package on a system without POSIX, such as Windows: what is missing there is used only where it need not be."""

from __future__ import annotations

import ast
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import deepseek_optimizer
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.backends.cpu.mapped_file import map_file
from deepseek_optimizer.bench.sides.model import drop_from_page_cache
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.server import run
from deepseek_optimizer_cli import chat
from support.without_posix import MODULES, NAMES, PACKAGES

SOURCES = Path(deepseek_optimizer.__file__).parents[1]
# Files that use such names, and what happens there without them.
ALLOWED = {
    "address_space.py": "there is no such limit",
    "backends/cpu/mapped_file.py": "the system reads ahead as it likes",
    "bench/background.py": "the load is unknown",
    "bench/sides/model.py": "an error says so",
    "bench/sides/vllm_side.py": "vLLM runs on Linux",
    "checkpoint/files.py": "a lock around a seek and a read",
    "checkpoint/locks.py": "`HAS_LOCKS` is false: writers of the same checkpoint are not detected",
    "checkpoint/prefix_files.py": "the directory is in the user's profile, and has its permissions",
    "deepseek_optimizer_cli/chat.py": "the console edits lines itself",
    "doctor/machine.py": "the load is unknown",
    "integration/load/proven_links.py": "`check_divisible` refuses other systems than Linux",
    "integration/load/rank_process.py": "`check_divisible` refuses other systems than Linux",
    "integration/load/ranks.py": "`check_divisible` refuses other systems than Linux",
    "system/affinity.py": "nothing is bound",
    "system/open_files.py": "there is no such limit",
    "system/pages.py": "no huge pages",
    "system/processor.py": "the system's CPUs",
    "system/sandbox/platforms.py": "`Portable`",
}
_ANY = re.compile(rf"\b({'|'.join((*MODULES, *' '.join(NAMES.values()).split()))})\b")  # parsing every file takes seconds
CODE = """
import json, sys
from pathlib import Path
from support.without_posix import failures

failed = failures()
from deepseek_optimizer.server.run import listener
from deepseek_optimizer.system.open_files import raise_file_limit
from deepseek_optimizer.system.sandbox.platforms import here
from deepseek_optimizer.system.sandbox.worker import Worker

raise_file_limit()
listener("127.0.0.1", 0).close()
worker = Worker(Path(sys.argv[1]), {})
answer = worker.call("a template")
worker.close()
print(json.dumps([failed, here(), answer]))
"""


@pytest.mark.wide
@pytest.mark.every_run
def test_every_module_can_be_imported(tmp_path):
    job = tmp_path / "job.py"
    job.write_text("def prepare(setup): return str.upper\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(job)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}, capture_output=True,
        text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[], "portable", "A TEMPLATE"]


def uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) where a source uses what Windows lacks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in NAMES.get(node.value.id, "").split():
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if node.module in MODULES or alias.name in NAMES.get(node.module or "", "").split():
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)


@pytest.mark.parametrize("source", ["os.fork()", "import fcntl", "from signal import SIGKILL", "from pwd import getpwuid"])
def test_the_search_finds_uses(source):
    assert [line for line, _ in uses(source)] == [1]


def test_other_names_are_no_uses():
    assert not list(uses("os.getpid(); signal.SIGTERM; self.fork(); from .os import fork"))


@pytest.mark.every_run
def test_uses_are_known():
    """A new use needs a way for Windows, or an error that names what is missing; then it may be added to `ALLOWED`."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((SOURCES / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            for line, name in uses(source) if _ANY.search(source) else ():
                place = path.relative_to(SOURCES).as_posix().removeprefix("deepseek_optimizer/")
                found.setdefault(place, []).append(f"{name} in line {line}")
    assert {place: names for place, names in found.items() if place not in ALLOWED} == {}
    assert not ALLOWED.keys() - found.keys()


@pytest.mark.skipif(unavailable_reason() is not None, reason="needs the native backend")
def test_a_file_is_mapped_without_huge_pages(tmp_path, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    path = tmp_path / "weights"
    path.write_bytes(b"abc" * 10_000)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        mapped = map_file(file.fileno(), status.st_size, status.st_mtime_ns, path)
        assert mapped[:3] == b"abc"


def test_an_interactive_chat_needs_no_readline(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "readline", None)
    chat._Loop(None, True)
    assert "/help" in capsys.readouterr().err


def test_a_cold_start_that_cannot_be_measured_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(BackendError, match="without --cold"):
        drop_from_page_cache(tmp_path)


def test_the_server_says_what_it_cannot_enforce(monkeypatch, caplog):
    monkeypatch.setattr(run, "here", lambda: "portable")
    monkeypatch.setattr(run, "Server", lambda *_: SimpleNamespace(run=lambda sockets: None, failure=None))
    monkeypatch.setattr(run.gc, "freeze", lambda: None)
    run.run(None, None, None, None)
    assert "the memory of worker processes is not limited on this system" in caplog.text
