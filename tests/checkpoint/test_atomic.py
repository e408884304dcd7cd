"""No incomplete file under the final name, wherever the writer is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from deepseek_optimizer.checkpoint import atomic, atomic_directory
from deepseek_optimizer.checkpoint.atomic import atomic_file, merged_directory, sweep
from deepseek_optimizer.errors import CheckpointError
from support.killed import die_at


def write(target: Path, text: str, overwrite: bool = False) -> None:
    with atomic_directory(target, overwrite) as directory:
        (directory / "a").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "b").write_text(text)


def content(target: Path) -> str | None:
    """The text that both files contain; None if the directory does not exist."""
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
def test_exceptions_preserve_the_old_state(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "old", "old")
    for target in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(type(error)), atomic_directory(target, overwrite=True) as directory:
            (directory / "a").write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["old"] and content(tmp_path / "old") == "old"


def test_a_target_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(tmp_path / "t"):
        write(tmp_path / "t", "other")
    assert content(tmp_path / "t") == "other" and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_every_step(tmp_path: Path, existing: bool) -> None:
    """SIGKILL before the n-th sync, rename or removal, for every n until the write succeeds."""
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


def in_child(work) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed(target: Path, write) -> None:
    """A process that is killed while writing."""

    def work() -> None:
        with write(target):
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(work), 0)


@pytest.mark.parametrize("write", [atomic_directory, atomic_file, merged_directory])
def test_the_next_write_removes_leftovers_of_a_killed_one(tmp_path: Path, write) -> None:
    killed(tmp_path / "t", write)
    killed(tmp_path / "other", write)
    (left,) = tmp_path.glob(".t.*.tmp")
    with write(tmp_path / "t"):
        assert not left.exists()
    assert [p.name.split(".")[1] for p in tmp_path.glob(".*")] == ["other"]  # files of another target are not touched


def test_files_of_a_concurrent_writer_stay(tmp_path: Path) -> None:
    """Including one in this process: the second of two writers wins, and both were complete."""
    with atomic_directory(tmp_path / "t", overwrite=True) as first:
        write(tmp_path / "t", "second")
        assert sweep(tmp_path / "t") == [first]
        (first / "a").write_text("first")
        (first / "sub").mkdir()
        (first / "sub" / "b").write_text("first")
    assert content(tmp_path / "t") == "first" and os.listdir(tmp_path) == ["t"]


def test_many_writers_of_one_directory_some_of_them_killed(tmp_path: Path) -> None:
    target = tmp_path / "t"
    write(target, "0")

    def writer(name: int) -> None:
        if name % 3 == 0:
            die_at(name, (os, "fsync"), (atomic, "_exchange"))
        for _ in range(10):
            write(target, str(name), overwrite=True)

    children = [in_child(lambda name=name: writer(name)) for name in range(1, 7)]
    while children:
        assert target.is_dir() and (target / "sub" / "b").read_text() in map(str, range(7))
        child, status = os.waitpid(children[-1], os.WNOHANG)
        if child:
            killed_one = len(children) % 3 == 0
            assert os.WTERMSIG(status) == signal.SIGKILL if killed_one else status == 0
            children.pop()
    write(target, "end", overwrite=True)
    assert content(target) == "end" and os.listdir(tmp_path) == ["t"]


def test_an_old_directory_that_was_moved_aside_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without an atomic exchange: killed between the two renames."""
    write(tmp_path / "t", "old")
    child = os.fork()
    if child == 0:
        atomic.sys.platform = "darwin"
        die_at(1, (os, "rename"))
        write(tmp_path / "t", "new", overwrite=True)
    os.waitpid(child, 0)
    assert content(tmp_path / "t") is None and len(list(tmp_path.glob(".t.*.tmp.old"))) == 1
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "t", overwrite=True):
        raise KeyboardInterrupt
    assert content(tmp_path / "t") == "old" and os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("replaceable", [True, False])
def test_a_merged_directory_keeps_what_it_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaceable) -> None:
    target = tmp_path / "t"
    write(target, "old")
    (target / "stale-1").write_text("old")
    (target / "link").symlink_to("a")
    target.chmod(0o750)
    if not replaceable:
        monkeypatch.chdir(target)  # a process in it would be left in a removed directory
    with merged_directory(target, lambda name: name.startswith("stale")) as folder:
        (folder / "a").write_text("new")
        (folder / "stale-2").write_text("new")
        (target / "late").write_text("meanwhile")
    assert sorted(os.listdir(target)) == ["a", "late", "link", "stale-2", "sub"] and os.listdir(tmp_path) == ["t"]
    assert (target / "a").read_text() == (target / "link").read_text() == "new" and os.readlink(target / "link") == "a"
    assert (target / "sub" / "b").read_text() == "old" and target.stat().st_mode & 0o777 == 0o750
    assert os.path.samefile(target, ".") != replaceable


@pytest.mark.parametrize("text", ["No space left on device (os error 28)", "IoError(Os { code: 28 }) (os error 28)"])
def test_errors_of_rust_libraries_become_os_errors(tmp_path: Path, text: str) -> None:
    """A bare Exception, as raised by `tokenizers`."""
    with pytest.raises(OSError, match="No space left on device: .*out") as error, atomic_directory(tmp_path / "out"):
        raise Exception(text)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(Exception, match="^other$"), atomic_directory(tmp_path / "out"):
        raise Exception("other")
