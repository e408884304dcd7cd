"""Files and directories: which are read, in which order, and problems with files that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek_optimizer import DocumentError
from deepseek_optimizer.longdoc import Problem, read, read_documents
from support.documents import pdf


def _write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def _names(root: Path, document: object) -> list[str]:
    return [os.path.relpath(file.name, root) for file in document.files]  # type: ignore[attr-defined]


def test_paths_and_directories_in_order(tmp_path: Path) -> None:
    _write(tmp_path, {"z.txt": "z", "d/b.txt": "b", "d/a/c.txt": "c", "d/B.md": "B", "d/a.txt": "a"})
    assert _names(tmp_path, read_documents(tmp_path / "z.txt")) == ["z.txt"]
    document = read_documents([str(tmp_path / "z.txt"), tmp_path / "d"])
    assert _names(tmp_path, document) == ["z.txt", "d/B.md", "d/a/c.txt", "d/a.txt", "d/b.txt"]
    assert [file.text for file in document.files] == ["z", "B", "c", "a", "b"]
    assert not document.problems
    again = read_documents([tmp_path / "d" / "b.txt", tmp_path / "d", tmp_path / "d" / "a"])
    assert sorted(_names(tmp_path, again)) == ["d/B.md", "d/a.txt", "d/a/c.txt", "d/b.txt"], "each once"


def test_directories_of_tools_are_skipped(tmp_path: Path) -> None:
    left_out = (
        ".git/config",
        ".hidden",
        "node_modules/x.js",
        "a/__pycache__/x.py",
        "CVS/Root",
        "env/lib/x.py",
        "env/pyvenv.cfg",
    )
    _write(tmp_path, {"a/code.py": "x = 1", **dict.fromkeys(left_out, "no")})
    document = read_documents(tmp_path)
    assert _names(tmp_path, document) == ["a/code.py"] and not document.problems
    assert read_documents(tmp_path / ".hidden").files[0].text == "no", "but what is named is read"


def test_links_out_of_a_directory_or_in_cycles_are_not_followed(tmp_path: Path) -> None:
    _write(tmp_path, {"tree/a.txt": "a", "outside.txt": "secret", "out/b.txt": "secret"})
    tree = tmp_path / "tree"
    for name, target in (("loop", "."), ("again", "a.txt"), ("out", "../out"), ("file", "../outside.txt"), ("gone", "none")):
        (tree / name).symlink_to(target)
    document = read_documents(tree)
    assert [file.text for file in document.files] == ["a"]
    assert {(os.path.basename(name), message.split(";")[0]) for name, message in document.problems} == {
        ("out", "is a link to outside the directory and was not followed"),
        ("file", "is a link to outside the directory and was not followed"),
        ("gone", "is a broken link"),
    }
    assert read_documents(tree / "file").files[0].text == "secret", "but a link that is named is"


def test_bad_files_are_reported_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {
        "a.txt": "good", "binary": bytes(range(256)) * 9, "broken.pdf": pdf(["x"])[:100], "empty.txt": "",
        "locked.pdf": pdf(["x"], user="secret"), "mixed.log": "Müller\n".encode() + "Müller\n".encode("latin-1"),
        "scan.pdf": pdf([""]), "word.docx": b"PK\x03\x04", "z.txt": "good too",
    })  # fmt: skip
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    opened, open_ = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *more: opened.append(path) or open_(path, *more))  # type: ignore[func-returns-value]
    document = read_documents(".")
    assert "./pipe" not in opened and "./z.txt" in opened, "what may block is not even opened"
    assert [(os.path.basename(file.name), file.text) for file in document.files] == [
        ("a.txt", "good"), ("mixed.log", "Müller\nM\ufffdller\n"), ("z.txt", "good too"),
    ]  # fmt: skip
    said = {os.path.basename(name): message for name, message in document.problems}
    assert {name: message.split(" ")[:4] for name, message in said.items()} == {
        "binary": "is a binary file,".split(), "broken.pdf": "is a damaged PDF".split(), "empty.txt": "is empty".split(),
        "locked.pdf": "is encrypted and needs".split(), "pipe": "is not a regular".split(),
        "scan.pdf": "has no text on".split(), "word.docx": "is a damaged .docx".split(),
    }  # fmt: skip
    assert document.files[1].warnings


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    (tmp_path / "b.txt").chmod(0)
    if os.access(tmp_path / "b.txt", os.R_OK):  # root may read everything
        opened = os.open
        monkeypatch.setattr(
            os, "open", lambda path, *more: opened(path if not path.endswith("b.txt") else "/proc/1/mem/", *more)
        )
    document = read_documents(tmp_path)
    assert [file.text for file in document.files] == ["a"]
    (problem,) = document.problems
    assert problem.file.endswith("b.txt") and problem.message.startswith("cannot be read: ")


def test_missing_paths_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, {"a.txt": "a"})
    monkeypatch.setattr(read, "_bytes_of", lambda *_: pytest.fail("something was read"))
    with pytest.raises(DocumentError, match="absent.txt: does not exist"):
        read_documents([tmp_path / "a.txt", tmp_path / "absent.txt"])


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="has no files to read"):
        read_documents(tmp_path)
    with pytest.raises(DocumentError, match="paths: no path was given"):
        read_documents([])
    _write(tmp_path, {"a.txt": "", "b": b"\0"})
    with pytest.raises(DocumentError, match="a.txt: is empty$"):
        read_documents(tmp_path / "a.txt")
    with pytest.raises(DocumentError, match="none of 2 files could be read: .*a.txt is empty; .*b is a binary file"):
        read_documents(tmp_path)


def test_limits_per_file_and_in_total(tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "a" * 600, "b.txt": "b" * 2000, "c.txt": "c" * 600, "d.txt": "d" * 100})
    document = read_documents(tmp_path, limit_bytes=1000, limit_total=1000)
    assert [file.text[0] for file in document.files] == ["a", "d"]
    assert [(os.path.basename(file), message) for file, message in document.problems] == [
        ("b.txt", "has 2,000 bytes, and only 400 are left of the limit for all files"),
        ("c.txt", "has 600 bytes, and only 400 are left of the limit for all files"),
    ]
    (problem,) = read_documents(tmp_path, limit_bytes=1000).problems
    assert problem.message == "has 2,000 bytes, and the limit is 1,000 per file"


class _Changing:
    """Replaces `read._read_all`: the file grows during the first `times` reads."""

    def __init__(self, times: int) -> None:
        self.times, self.read = times, read._read_all

    def __call__(self, file: object, limit: int) -> bytes:
        data = self.read(file, limit)  # type: ignore[arg-type]
        if self.times:
            self.times -= 1
            with open(file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}", "ab") as more:  # type: ignore[attr-defined]
                more.write(b"more\n")
        return data


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    _write(tmp_path, {"a.log": "line\n", "b.txt": "b"})
    monkeypatch.setattr(read, "_read_all", _Changing(times))
    document = read_documents(tmp_path)
    if times == 1:
        assert [file.text for file in document.files] == ["line\nmore\n", "b"] and not document.problems, "read again"
    else:
        assert [file.text for file in document.files] == ["b"]
        assert document.problems == (
            Problem(str(tmp_path / "a.log"), "changed twice while being read; try again when no process writes to it"),
        )


def test_ten_thousand_small_files(tmp_path: Path) -> None:
    for i in range(10_000):
        (tmp_path / f"{i:05}.txt").write_bytes(b"file %d\n" % i)
    calls: list[tuple[int, int]] = []
    document = read_documents(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert len(document.files) == 10_000 and document.files[4321].text == "file 4321\n"
    assert calls[-1] == (10_000, 10_000)


def test_one_line_of_50_mb(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 50_000_000)
    (file,) = read_documents(tmp_path / "a.txt").files
    assert len(file.text) == 50_000_000 and file.line_of(49_999_999) == 1
