"""The path of a request."""

from __future__ import annotations

from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path of a request, without the root path. Like Starlette's routes, it accepts requests from which a reverse proxy has
    removed the root path, and requests with it."""
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
