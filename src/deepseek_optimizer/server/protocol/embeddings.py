"""/v1/embeddings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import IgnoredFields, ModelName, ResponseModel
from .completions import Prompt
from .sampling import Priority


class EmbeddingRequest(IgnoredFields):
    """Texts, or their token ids, to embed."""

    model: ModelName = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: encodes little-endian float32.")
    dimensions: None = None
    priority: Priority = None


class Embedding(ResponseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


EXAMPLE: dict[str, Any] = {"input": "Hello"}
