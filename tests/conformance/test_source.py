"""The download of Transformers' tests, and the error when it fails. No network: pip is replaced."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import pytest

from conformance import source
from conformance.run import main
from conformance.source import NEEDED, OFFLINE, SourceError, cached_tests


def archive(path, names):
    with tarfile.open(path, "w:gz") as made:
        for name in names:
            content = f"# {name}\n".encode()
            entry = tarfile.TarInfo(f"transformers-1/{name}")
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replaces pip by a function that provides these files, or fails with this message; counts its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(OFFLINE, raising=False)
    calls = []

    def use(names=(), error=None):
        def run(command, **kwargs):
            calls.append(command)
            if error is None:
                folder = command[command.index("--dest") + 1]
                archive(f"{folder}/transformers-1.tar.gz", names)
            return subprocess.CompletedProcess(command, int(error is not None), "", error or "")

        monkeypatch.setattr(source.subprocess, "run", run)
        return calls

    return use


def test_only_the_tests_are_extracted_and_only_once(pip):
    calls = pip([*(f"tests/{name}" for name in NEEDED), "tests/deep/test_a.py", "src/x.py", "tests/data.bin"])
    folder = cached_tests()
    assert sorted(path.name for path in folder.iterdir()) == sorted(NEEDED)
    assert cached_tests() == folder
    assert len(calls) == 1


def test_archives_without_tests_are_errors_and_removed(pip):
    calls = pip(["tests/test_other.py"])
    for _ in range(2):
        with pytest.raises(SourceError, match="transformers-1.tar.gz has no tests/test_modeling_common.py"):
            cached_tests()
    assert len(calls) == 2


def test_an_unreachable_index_is_an_error_with_a_remedy(pip, monkeypatch, capsys):
    pip(error="warning\nERROR: No matching distribution found")
    monkeypatch.setattr(sys, "argv", ["run"])
    assert main() == 1
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(SourceError, match=f"No matching distribution found; connect to a package index, or set {OFFLINE}=1"):
        cached_tests()


def test_tests_are_skipped_only_by_the_variable(pip, monkeypatch, capsys):
    calls = pip(error="never")
    monkeypatch.setenv(OFFLINE, "1")
    monkeypatch.setattr(sys, "argv", ["run"])
    assert main() == 0
    assert f"left out, {OFFLINE}=1" in capsys.readouterr().out
    assert not calls
