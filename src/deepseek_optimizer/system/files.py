"""Files by which the kernel tells about itself and this process."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def read_text(root: Path, path: str) -> str:
    """A system file's text without white space around it; "" where it can't be read."""
    try:
        return (root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_sizes(root: Path, path: str) -> dict[str, int]:
    """Bytes by name, of a file of lines such as `MemTotal:  1024 kB` or `inactive_file 4096`."""
    found = {}
    for line in read_text(root, path).splitlines():
        words = line.replace(":", " ", 1).split()
        if len(words) in (2, 3) and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found
