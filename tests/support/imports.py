"""The imports of the package's sources, read from their syntax trees; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .layers import CLI, PACKAGE, SOURCES


@dataclass(frozen=True)
class Import:
    """An imported module.

    Attributes:
        module: the importing module's dotted name.
        target: the imported module: the file's module if it is ours, or another package's module as written.
        names: imported names; empty for `import target`.
        line: of the file.
        kind: "top", "late" (inside a function), or "type" (under `if TYPE_CHECKING:`).
    """

    module: str
    target: str
    names: tuple[str, ...]
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target} ({self.kind})"


def sources() -> dict[str, Path]:
    """Every module of the package and of the command line, by its dotted name."""
    result = {}
    for package in (PACKAGE, CLI):
        for file in sorted((SOURCES / package).rglob("*.py")):
            name = ".".join(file.relative_to(SOURCES).with_suffix("").parts)
            result[name.removesuffix(".__init__")] = file
    return result


def imports(modules: dict[str, Path]) -> list[Import]:
    """All imports of all modules."""
    return [result for name, file in modules.items() for result in _of_file(name, file, modules)]


def _of_file(name: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), name, package, modules, "top")


def _walk(node: ast.AST, name: str, package: str, modules: dict[str, Path], kind: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and kind == "top":
            inner = "late"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = "type"
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, (), child.lineno, kind) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                above = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            rest = []
            for alias in child.names:
                if f"{base}.{alias.name}" in modules:
                    yield Import(name, f"{base}.{alias.name}", (), child.lineno, kind)
                else:
                    rest.append(alias.name)
            if rest:
                yield Import(name, base, tuple(rest), child.lineno, kind)
        yield from _walk(child, name, package, modules, inner)
