"""Parts of all protocols: strict models, validation errors that name the field, usage, and ignored fields."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...backends.qualities import Quality
from ...errors import excerpt, shown
from ..http.problems import ApiError

TOKEN_ID = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
_NO_NAMES = ("", "dummy", "tgi")  # sent by clients, such as huggingface_hub, whose user names no model
ModelName = Annotated[
    Annotated[str, Field(max_length=1024)] | None,
    AfterValidator(lambda name: None if name in _NO_NAMES else name),
    Field(description="As in /v1/models; the default is the model that is served."),
]
OLLAMA_TAG = ":latest"  # Ollama's clients may add it to a model's name, also in requests to other protocols
_MAX_NAMED = 5  # fields in one error
Ignored = Annotated[Any, Field(default=None, description="Accepted and ignored.")]


class Body(BaseModel):
    """A request, or part of one. By default, types are not converted: a number in quotes is an error, and so are `true` for 1
    and an unknown field. `tolerance.parse_tolerantly` accepts them.

    Lists that may be long have `fail_fast`, so that a request cannot cause a million errors, of which one is reported.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True)


class ResponseModel(BaseModel):
    """A response, or part of one."""

    model_config = ConfigDict(protected_namespaces=())


class IgnoredFields(Body):
    """OpenAI's fields that clients send and that have no effect here."""

    user: Ignored
    metadata: Ignored
    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    cache_prompt: Ignored  # llama-server's; prefixes are always cached


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: dict[str, Any]) -> Model:
    """Validates a body.

    Raises:
        ApiError: 400, a field is invalid; see `field_error`.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise field_error(error, body) from None


def field_error(error: ValidationError, body: Any) -> ApiError:
    """The response to a body that failed validation: one field, or those beside it with the same fault, and what is wrong. The
    value is not included, since it may be long or secret."""
    errors: dict[str, list[str]] = {}
    for one in error.errors(include_url=False, include_input=False):
        path = ".".join(_path(one["loc"], body, one["type"]))
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = f"the field {shown(path.rsplit('.', 1)[-1])} is not supported; leave it out"
        tag = one.get("ctx", {}).get("tag")
        if isinstance(tag, str):  # of a union, as the client sent it
            message = message.replace(tag, excerpt(tag))
        errors.setdefault(path, []).append(message)
    # For a field with alternatives, the alternative that matched furthest gives the most useful error.
    path, messages = max(errors.items(), key=lambda item: item[0].count("."))
    message = ", or: ".join(dict.fromkeys(messages[:3]))
    fields = [other for other in errors if errors[other] == messages and _parent(other) == _parent(path)]
    names = ", ".join(map(excerpt, fields[:_MAX_NAMED]))
    return ApiError(400, f"{names}: {message}" if path else message, param=path or None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _path(loc: tuple[int | str, ...], body: Any, kind: str) -> list[str]:
    """The location of an error in the body, without the names that pydantic inserts for alternatives of a union."""
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
    """An error response."""

    error: ErrorDetail


class CachedTokens(ResponseModel):
    cached_tokens: int


class ReasoningTokens(ResponseModel):
    reasoning_tokens: int


class Usage(ResponseModel):
    """Numbers of tokens, of all answers together. If the server has a cache window, `dropped_tokens` counts those that were
    dropped from it or never in it, and `context_tokens` those in it at the end. `quality`, of models with several: the lowest
    that an answer was computed at."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None
    dropped_tokens: int | None = None
    context_tokens: int | None = None
    quality: Quality | None = None
