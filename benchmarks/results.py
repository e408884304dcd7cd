"""Results on disk: benchmarks/results/SET.json for each of `SETS`, name of a row -> what was measured.

Every entry says when and on which machine it was measured, so that a part of a set can be measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("results")
SETS = ("spine", "standing", "deepseek", "long", "speculation", "serving", "window", "training")

Entries = dict[str, dict[str, Any]]


def read(name: str, directory: Path = DIRECTORY) -> Entries:
    """Entries of one of `SETS`; none where nothing was measured yet."""
    path = directory / f"{name}.json"
    found: Entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def merge(name: str, entries: Entries, directory: Path = DIRECTORY) -> None:
    """Puts entries in the place of those with the same names."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    text = json.dumps({**read(name, directory), **entries}, indent=1, ensure_ascii=False) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
