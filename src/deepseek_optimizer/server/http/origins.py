"""Cross-origin requests (CORS): which origins' web pages may use the API."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from ..settings import LOCALHOST

_LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"


class OriginCheck(CORSMiddleware):
    """Starlette's middleware with origins of this machine, and with llama-server's answers to preflight requests: the origin
    itself instead of `*`, and status 200 without permission for other origins. Browsers then refuse the request. Credentials,
    such as cookies, are never permitted.

    Args:
        app: the next application.
        allow_origins: see `ServerSettings`.
        allow_headers, expose_headers: headers of requests and of responses.
    """

    def __init__(
        self, app: ASGIApp, allow_origins: Sequence[str], allow_headers: Sequence[str], expose_headers: Sequence[str]
    ) -> None:
        super().__init__(
            app,
            allow_origins=[origin for origin in allow_origins if origin != LOCALHOST],
            allow_origin_regex=_LOCAL if LOCALHOST in allow_origins else None,
            allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
            allow_headers=allow_headers,
            expose_headers=expose_headers,
        )
        self.preflight_explicit_allow_origin = True

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight request."""
        if not self.is_allowed_origin(request_headers["origin"]):
            return PlainTextResponse("this origin is not allowed; --allow-origin allows it", headers={"Vary": "Origin"})
        return super().preflight_response(request_headers)
