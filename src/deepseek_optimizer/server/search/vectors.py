"""From a pooled vector to the embedding of a response: dense layers, fewer dimensions, and the norm."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from ...checkpoint.sentence_transformers import Dense, EmbeddingSettings

_INT16 = 32_760.0  # llama-server's largest value of a vector with embd_normalize 0
UNIT = 2  # the norm by which vectors have length 1
NO_NORM = -1

_Vector = npt.NDArray[np.float32]


def embedding(pooled: _Vector, settings: EmbeddingSettings, dimensions: int | None, norm: int) -> _Vector:
    """The embedding of a text.

    Args:
        pooled: float32 [H], from the engine.
        settings: the checkpoint's, for its dense layers.
        dimensions: number of leading elements to keep (Matryoshka embeddings); None: all.
        norm: see `normalized`.

    Returns: float32 [dimensions].
    """
    for layer in settings.dense:
        pooled = _applied(layer, pooled)
    return normalized(pooled[:dimensions], norm)


def normalized(vector: _Vector, norm: int) -> _Vector:
    """A vector divided by its norm, as llama-server's `embd_normalize` numbers them; a zero vector remains zero.

    Args:
        vector: float32 [n].
        norm: -1: unchanged; 0: the largest magnitude becomes 32,760; p > 0: the p-norm becomes 1 (2: unit length).
    """
    if norm == NO_NORM:
        return vector
    values = np.abs(vector.astype(np.float64))
    largest = float(values.max(initial=0.0))
    if largest == 0:
        return vector
    if norm == 0:
        size = largest / _INT16
    else:  # of the values divided by the largest, so that no power overflows
        size = largest * float(((values / largest) ** norm).sum()) ** (1 / norm)
    return (vector / size).astype(np.float32)


def cosine(one: _Vector, other: _Vector) -> float:
    """The cosine of the angle between two vectors, float32 [n]; 0 if one of them is zero."""
    return float(normalized(one, UNIT).astype(np.float64) @ normalized(other, UNIT).astype(np.float64))


def dimensions_of(hidden: int, settings: EmbeddingSettings) -> int:
    """The number of elements of an embedding, given the number of elements of a hidden state."""
    return len(settings.dense[-1].weight) if settings.dense else hidden * len(settings.pooling)


def encoded(value: _Vector, as_base64: bool) -> Any:
    """A vector or matrix as it appears in JSON: a list of numbers, or base64 of its little-endian float32.

    A list is encoded here, so that the many numbers of a response are not encoded in one call, during which nothing else runs.
    """
    values = np.ascontiguousarray(value, "<f4")
    if as_base64:
        return base64.b64encode(values.tobytes()).decode()
    return orjson.Fragment(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))


def _applied(layer: Dense, vector: _Vector) -> _Vector:
    result = layer.weight @ vector
    if layer.bias is not None:
        result = result + layer.bias
    result = _activated(layer.activation, result)
    if layer.residual is not None:
        result = result + (vector if isinstance(layer.residual, str) else layer.residual @ vector)
    return np.asarray(result, np.float32)


def _activated(name: str, values: _Vector) -> _Vector:
    if name == "Tanh":
        return np.tanh(values)
    if name == "ReLU":
        return np.maximum(values, 0)
    return sigmoid(values) if name == "Sigmoid" else values


def sigmoid(values: Any) -> Any:
    """1 / (1 + exp(-values)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(values)))


def softmax(values: Any) -> Any:
    """exp(values) divided by their sum, over the last axis."""
    powers = np.exp(np.asarray(values, np.float64) - np.max(values, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
