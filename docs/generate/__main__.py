"""Writes the generated parts of the documentation.

python -m docs.generate            writes them
python -m docs.generate --check    exits with 1 and names the files that are out of date
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from . import api, command_line, models, ops, settings

ROOT = Path(__file__).resolve().parents[2]
PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/config.md": settings.page,
    "docs/reference/command-line.md": command_line.page,
    "docs/reference/api.md": api.page,
    "docs/reference/ops.md": ops.page,
}
BLOCKS: dict[str, Callable[[], str]] = {
    "models": models.short_table,
    "models-zh": lambda: models.short_table(("模型", "参数量", "int4", "int8", "bf16")),
    "models-memory": models.long_table,
    "families": models.families_table,
    "gguf": models.gguf_table,
}
WITH_BLOCKS = ("README.md", "README.zh-CN.md", "docs/models.md")
_BLOCK = re.compile(r"(<!-- generated:([\w-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def outdated() -> dict[Path, str]:
    """Files that differ from what the code says, with the text that they should have. ValueError if a block is missing."""
    wanted = {ROOT / name: f"{make()}\n" for name, make in PAGES.items()}
    missing = set(BLOCKS)
    for name in WITH_BLOCKS:
        text = (ROOT / name).read_text(encoding="utf-8")
        missing -= {name for _, name, _ in _BLOCK.findall(text)}
        wanted[ROOT / name] = _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)
    if missing:
        raise ValueError(f"no page has the generated block {sorted(missing)[0]!r}; restore its markers")
    return {p: text for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args().check
    found = outdated()
    for path, text in found.items():
        print(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and found:
        raise SystemExit("out of date: run python -m docs.generate")


if __name__ == "__main__":
    main()
