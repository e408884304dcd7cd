"""Responses of Ollama's API, for the OpenAPI schema."""

from __future__ import annotations

from typing import Any, Literal

from ....backends.qualities import Quality
from ..base import ResponseModel


class _Ended(ResponseModel):
    """Fields of the last object. Durations are in nanoseconds. `quality`: of models with several, the one that was used."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    quality: Quality | None = None


class OllamaMessage(ResponseModel):
    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaChat(_Ended):
    message: OllamaMessage


class OllamaGenerate(_Ended):
    response: str
    thinking: str | None = None


class OllamaEmbed(ResponseModel):
    """Vectors of length 1."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddings(ResponseModel):
    embedding: list[float]


class OllamaDetails(ResponseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(ResponseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails


class OllamaModels(ResponseModel):
    models: list[OllamaModel]


class OllamaRunning(OllamaModel):
    expires_at: str
    size_vram: int
    context_length: int


class OllamaProcesses(ResponseModel):
    models: list[OllamaRunning]


class OllamaShow(ResponseModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaPulled(ResponseModel):
    status: Literal["success"]


class OllamaVersion(ResponseModel):
    version: str


class OllamaError(ResponseModel):
    error: str
