"""The check of commit messages in `make lint`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci/check_commits.py"


@pytest.fixture(scope="module")
def check():
    if not SCRIPT.is_file():
        pytest.skip("the source distribution has no .ci")
    spec = importlib.util.spec_from_file_location("check_commits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "message, wrong",
    [
        ("Say why\n\nBecause.", ()),
        ("x" * 72 + "\n\nBecause.", ()),
        ("x" * 73 + "\n\nBecause.", ("73 characters",)),
        ("Say why\n", ("no body",)),
        ("Say why\nBecause.", ("empty line",)),
        ("x" * 80, ("80 characters", "no body")),
    ],
)
def test_messages(check, message, wrong):
    actual = check.problems(message)
    assert len(actual) == len(wrong) and all(part in problem for part, problem in zip(wrong, actual, strict=True)), actual


def test_only_new_commits_are_checked(check, tmp_path, capsys):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(message):
        git("commit", "--allow-empty", "-m", message)

    git("init")
    commit("An old title " + "x" * 80)
    assert check.main(tmp_path) == 0  # neither origin/main nor the recorded commit, as in a shallow clone
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    commit("A good one\n\nBecause.")
    assert check.main(tmp_path) == 0
    commit("A new title " + "x" * 80)
    assert check.main(tmp_path) == 1
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 2 and all("A new title" in line for line in output)


def test_a_clone_of_main_is_checked_from_the_recorded_commit(check, tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]

    def git(*arguments):
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "An old title " + "x" * 80)
    monkeypatch.setattr(check, "BASE", git("rev-parse", "HEAD"))
    git("commit", "--allow-empty", "-m", "A new title " + "x" * 80)
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert check.main(tmp_path) == 1


def test_a_tarball_without_git_has_no_commits(check, tmp_path, monkeypatch):
    assert check.main(tmp_path) == 0
    monkeypatch.setenv("PATH", "")
    assert check.main(tmp_path) == 0
