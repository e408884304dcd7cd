"""What all protocols share: strict models, the error that names a wrong field, usage, fields that change nothing."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import excerpt, shown
from ..http.problems import ApiError

TOKEN_ID = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
ModelName = Annotated[
    Annotated[str, Field(max_length=1024)] | None, Field(description="Of /v1/models; without it, the one there is.")
]
Ignored = Annotated[Any, Field(default=None, description="Accepted and ignored.")]


class Body(BaseModel):
    """A request, or part of one. A number in quotes is no number, true is not 1, and a field that is not known is an error.

    Lists that may be long have `fail_fast`: one error is told, and a client could make a million.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True)


class ResponseModel(BaseModel):
    """An answer, or part of one."""

    model_config = ConfigDict(protected_namespaces=())


class Harmless(Body):
    """Fields of OpenAI's that clients send, and that change nothing here."""

    user: Ignored
    metadata: Ignored
    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: dict[str, Any]) -> Model:
    """
    Raises:
        ApiError: 400, for the first field that is wrong.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise field_error(error, body) from None


def field_error(error: ValidationError, body: Any) -> ApiError:
    """What a client is told: the field and what is wrong with it, without the value, which may be long or secret."""
    found: dict[str, list[str]] = {}
    for one in error.errors(include_url=False, include_input=False):
        path = ".".join(_path(one["loc"], body, one["type"]))
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = f"this server does not know the field {shown(path.rsplit('.', 1)[-1])}; leave it out"
        tag = one.get("ctx", {}).get("tag")
        if isinstance(tag, str):  # of a union, as the client gave it
            message = message.replace(tag, excerpt(tag))
        found.setdefault(path, []).append(message)
    # Of a field that may be several things, the branch that got furthest knows best what is wrong.
    path, messages = max(found.items(), key=lambda item: item[0].count("."))
    message = ", or: ".join(dict.fromkeys(messages[:3]))
    return ApiError(400, f"{excerpt(path)}: {message}" if path else message, param=path or None)


def _path(loc: tuple[int | str, ...], body: Any, kind: str) -> list[str]:
    """Where in the body; names that pydantic puts in for a union's branches are not there."""
    path = []
    for at, part in enumerate(loc):
        if isinstance(body, dict) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        elif kind != "missing" or at < len(loc) - 1:
            continue
        path.append(str(part))
    return path


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(ResponseModel):
    """Every error has this shape."""

    error: ErrorDetail


class CachedTokens(ResponseModel):
    cached_tokens: int


class ReasoningTokens(ResponseModel):
    reasoning_tokens: int


class Usage(ResponseModel):
    """Tokens: of all answers together; where there is a window, `dropped_tokens` are those that it
    has let go of or never held, and `context_tokens` those that it held at the end."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None
    dropped_tokens: int | None = None
    context_tokens: int | None = None
