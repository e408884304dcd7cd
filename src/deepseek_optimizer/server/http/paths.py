"""The path of a request."""

from __future__ import annotations

from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path of a request, without the root path."""
    path: str = scope.get("path", "")
    return path.removeprefix(scope.get("root_path", ""))
