"""/: the chat page and its files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response

from ..http.page_files import HEADERS, PageFile, missing_libraries
from ..http.problems import ApiError

INDEX = "index.html"
DISABLED = "this server has no chat page, since it was started with --no-ui"
logger = logging.getLogger("deepseek_optimizer.server")


def paths(files: dict[str, PageFile]) -> dict[str, PageFile]:
    """The page's files by path. They need no API key."""
    others = {f"/page/{name}": file for name, file in files.items() if name != INDEX}
    return {"/": files[INDEX], **others} if INDEX in files else others


def add(app: FastAPI, files: dict[str, PageFile]) -> None:
    if missing := missing_libraries(files):
        logger.warning(
            "the chat page shows answers as plain text: this installation was built without %s; rebuild it with npm and "
            "network access, or run build_tools/page_assets.py in the source tree",
            ", ".join(missing),
        )
    if INDEX not in files:
        leave_out(app, "this installation has no chat page")
    for path, file in paths(files).items():
        app.get(path, include_in_schema=False)(_serve(file))


def leave_out(app: FastAPI, why: str) -> None:
    """Answers requests for the page with status 404; other methods have other meanings at its path."""

    @app.get("/", include_in_schema=False)
    async def no_page() -> Response:
        raise ApiError(404, why)


def _serve(file: PageFile) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    headers = {**HEADERS, "Content-Type": file.type, "ETag": file.etag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers)

    return serve
