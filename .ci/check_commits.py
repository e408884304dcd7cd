"""Checks the messages of new commits: a title of at most 72 characters, and a body that says why.

New are the commits since HEAD and origin/main parted; where there is no origin/main, or it has them already, as in a fresh
clone, those since BASE. In a tarball, a shallow clone that lacks these commits, or without git there is nothing to check.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BASE = "aa543dfcf7a21be9e40c6a11498fad117da4c281"  # titles before it are longer
TITLE = 72


def problems(message: str) -> list[str]:
    """What is wrong with a commit's message."""
    title, _, body = message.strip().partition("\n")
    found = []
    if len(title) > TITLE:
        found.append(f"the title has {len(title)} characters, {TITLE} at most: move the rest into the body")
    if not body.strip():
        found.append("there is no body: say why, below an empty line")
    elif body.split("\n", 1)[0].strip():
        found.append("an empty line belongs between title and body")
    return found


def new_commits(root: Path) -> list[str]:
    """Hashes, the newest first; none where git cannot tell."""
    start = _git(root, "merge-base", "origin/main", "HEAD")
    if start in ("", _git(root, "rev-parse", "HEAD")) and _git(root, "merge-base", BASE, "HEAD") == BASE:
        start = BASE
    return _git(root, "rev-list", "--no-merges", f"{start}..HEAD").split() if start else []


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(root: Path) -> int:
    bad = 0
    for commit in new_commits(root):
        message = _git(root, "show", "-s", "--format=%B", commit)
        for problem in problems(message):
            print(f"commit {commit[:10]} ({message[:40]!r}): {problem}", file=sys.stderr)
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[1]))
