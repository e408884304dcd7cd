"""The path of a request, and the prefix under which a reverse proxy serves it."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


def path_of(scope: Scope) -> str:
    """The path of a request, without the root path. Like Starlette's routes, it accepts requests from which a reverse proxy has
    removed the root path, and requests with it."""
    path: str = scope.get("path", "")
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class RootPath:
    """ASGI middleware that sets the root path of requests. uvicorn's own option would put it before paths that have it already.

    Args:
        app: the application.
        path: the root path, such as "/llm".
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._path}, receive, send)
