"""Nothing half-written under the final name, wherever the writer dies."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from deepseek_optimizer.checkpoint import atomic, atomic_directory
from deepseek_optimizer.errors import CheckpointError
from support.killed import die_at


def write(target: Path, text: str, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite) as directory:
        (directory / "a").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "b").write_text(text)


def content(target: Path) -> str | None:
    """The one text in both files; None if there is no such directory."""
    if not target.exists():
        return None
    assert (target / "a").read_text() == (target / "sub" / "b").read_text()
    return (target / "a").read_text()


def test_new_and_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "t"
    write(target, "old")
    with pytest.raises(CheckpointError, match="exists already"):
        write(target, "new")
    assert content(target) == "old"
    write(target, "new", overwrite=True)
    assert content(target) == "new" and os.listdir(target.parent) == ["t"]


def test_without_an_exchange_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.sys, "platform", "darwin")
    write(tmp_path / "t", "old")
    write(tmp_path / "t", "new", overwrite=True)
    assert content(tmp_path / "t") == "new" and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_exceptions_leave_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "old", "old")
    for target in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(type(error)), atomic_directory(target, overwrite=True) as directory:
            (directory / "a").write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["old"] and content(tmp_path / "old") == "old"


def test_a_target_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(tmp_path / "t"):
        write(tmp_path / "t", "other")
    assert content(tmp_path / "t") == "other" and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_every_step(tmp_path: Path, existing: bool) -> None:
    """SIGKILL before the n-th sync, rename or removal, for every n until the write gets through."""
    steps = 0
    for n in range(100):
        target = tmp_path / str(n) / "t"
        if existing:
            write(target, "old")
        child = os.fork()
        if child == 0:
            die_at(n, (os, "fsync"), (os, "rename"), (atomic, "_exchange"), (shutil, "rmtree"))
            write(target, "new", overwrite=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0 and content(target) == "new"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert content(target) in ("new", "old" if existing else None)
        steps += 1
    assert steps >= 6, "files, directories, the rename and the parent are separate steps"


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = atomic.sync, os.rename
    monkeypatch.setattr(atomic, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    write(tmp_path / "t", "x")
    before = set(events[: events.index("rename")])
    assert {"a", "b", "sub"} <= before and any(e.endswith(".tmp") for e in before)
    assert events[-1] == tmp_path.name


def test_a_full_disk_names_the_target(tmp_path):
    with pytest.raises(OSError, match="No space left.*out"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
