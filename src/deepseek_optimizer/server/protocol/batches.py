"""/v1/batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ...batch.requests import ENDPOINTS
from ..batches.job import Batch
from .base import Body, ResponseModel
from .files import MAX_SECONDS, MIN_SECONDS

_MAX_METADATA = 16
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class OutputExpiresAfter(Body):
    """When the files of results expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]


class CreateBatchRequest(Body):
    """A batch to create."""

    input_file_id: Annotated[str, Field(max_length=256, description="An uploaded file with purpose batch.")]
    endpoint: Literal[ENDPOINTS] = Field(description="The url of all requests in the file.")  # type: ignore[valid-type]
    completion_window: Literal["24h"] = Field(description="The time in which requests are answered.")
    metadata: Annotated[dict[_Key, _Value], Field(max_length=_MAX_METADATA)] | None = None
    output_expires_after: OutputExpiresAfter | None = None


class RequestCounts(ResponseModel):
    """The number of requests: all, those with an answer, and those with an error."""

    total: int
    completed: int
    failed: int


class BatchProblem(ResponseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchProblems(ResponseModel):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchProblem]


class BatchObject(ResponseModel):
    """A batch. Times are Unix times in seconds."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None = Field(description="The file of answers; null if there are none, or not yet.")
    error_file_id: str | None = Field(description="The file of requests that failed; null if there are none, or not yet.")
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(ResponseModel):
    """Batches, newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> dict[str, Any]:
    """A batch as a `BatchObject`."""
    return {
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file, "completion_window": batch.window, "status": batch.status,
        "output_file_id": batch.output_file, "error_file_id": batch.error_file, "created_at": batch.created,
        "expires_at": batch.expires, **{f"{status}_at": batch.times.get(status) for status in _TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }  # fmt: skip


EXAMPLE: dict[str, Any] = {"input_file_id": "file-1234", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
