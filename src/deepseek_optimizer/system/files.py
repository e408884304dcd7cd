"""Reads files with information of the kernel, such as those in /proc."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def read_text(root: Path, path: str) -> str:
    """Returns the text of a system file without surrounding white space; "" if it cannot be read."""
    try:
        return (root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_sizes(root: Path, path: str) -> dict[str, int]:
    """Returns sizes in bytes by name, from a file with lines such as `MemTotal:  1024 kB` or `inactive_file 4096`."""
    sizes = {}
    for line in read_text(root, path).splitlines():
        words = line.replace(":", " ", 1).split()
        if len(words) in (2, 3) and words[1].isdigit():
            sizes[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return sizes
