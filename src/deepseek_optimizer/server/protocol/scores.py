"""Rerank (Jina's and Cohere's, as vLLM serves them), score, classify and pooling (vLLM's)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..http.problems import ApiError
from .base import Body, ResponseModel
from .embeddings import MAX_INPUTS, Embeds, Inputs, PromptUsage, Truncated


class TextDocument(Body):
    text: str


_Instruction = Annotated[str, Field(max_length=16_384)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
_Documents = Annotated[list[str | TextDocument], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
_Tokens = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class Scores(Truncated):
    """Fields of requests for scores of pairs of texts."""

    use_activation: bool | None = Field(None, description="Whether scores are probabilities; false: the model's logits.")
    instruction: _Instruction | None = Field(None, description="The task, for a language model that judges documents.")


class RerankRequest(Scores):
    """A query, and documents to sort by their relevance to it."""

    query: Annotated[str, Field(min_length=1)]
    documents: _Documents | None = None
    texts: _Texts | None = Field(
        None, description="The documents, in place of `documents`: the response then has TEI's format, a list of scores."
    )
    top_n: _Tokens | None = Field(None, description="Return this number of the most relevant documents; 0: all.")
    return_documents: bool | None = Field(None, description="Whether to return the documents; the default is true.")
    return_text: bool | None = Field(None, description="TEI's name of `return_documents`; the default is false.")
    raw_scores: bool | None = Field(None, description="TEI's opposite of `use_activation`.")
    max_tokens_per_doc: _Tokens | None = Field(
        None, description="Shorten longer documents to this number of tokens; 0: do not."
    )
    max_chunks_per_doc: None = None

    def given(self) -> list[str]:
        """The documents.

        Raises:
            ApiError: 400, not exactly one of the two fields is given.
        """
        if (self.documents is None) == (self.texts is None):
            raise ApiError(400, "documents: give either documents or texts", param="documents")
        return [one if isinstance(one, str) else one.text for one in self.documents or self.texts or ()]


class RerankResult(ResponseModel):
    index: int
    relevance_score: float
    document: TextDocument | None = None


class RerankResponse(ResponseModel):
    id: str
    model: str
    usage: PromptUsage
    results: list[RerankResult]


class RankedText(ResponseModel):
    index: int
    score: float
    text: str | None = None


class ScoreRequest(Scores):
    """Pairs of texts to score: the first texts by any of the names `text_1`, `queries` and `data_1`, the second by `text_2`,
    `documents`, `items` and `data_2`. One text may be paired with several."""

    text_1: str | _Texts | None = None
    text_2: str | _Texts | None = None
    queries: str | _Texts | None = None
    documents: str | _Texts | None = None
    items: str | _Texts | None = None
    data_1: str | _Texts | None = None
    data_2: str | _Texts | None = None
    max_tokens_per_doc: _Tokens | None = Field(None, description="Shorten longer second texts to this number of tokens.")

    def pairs(self) -> tuple[list[str], list[str]]:
        """The first texts, one or as many as the second, and the second texts.

        Raises:
            ApiError: 400, there are none, or their numbers do not match.
        """
        first = _only(self, "text_1", "queries", "data_1")
        second = _only(self, "text_2", "documents", "items", "data_2")
        if len(first) != 1 and len(first) != len(second):
            raise ApiError(
                400, f"text_1: {len(first)} texts cannot be paired with {len(second)}; give 1, or as many", param="text_1"
            )
        return first, second


def _only(body: ScoreRequest, *names: str) -> list[str]:
    values = [value for name in names if (value := getattr(body, name)) is not None]
    if len(values) != 1:
        raise ApiError(400, f"{names[0]}: give exactly one of {', '.join(names)}", param=names[0])
    return [values[0]] if isinstance(values[0], str) else list(values[0])


class Score(ResponseModel):
    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class ClassifyRequest(Truncated):
    """Texts, or their token ids, to classify."""

    input: Inputs
    use_activation: bool | None = Field(None, description="Whether to return probabilities; false: the model's logits.")
    add_special_tokens: bool | None = None


class Classification(ResponseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: PromptUsage


class PoolingRequest(Embeds):
    """Texts, or their token ids, to pool."""

    input: Inputs
    task: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="classify for a model with a classification head, otherwise embed; the default is the model's own."
    )


class Pooled(ResponseModel):
    index: int
    object: Literal["pooling"]
    data: list[float] | str


class PoolingResponse(ResponseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Pooled]
    usage: PromptUsage


EXAMPLE_RERANK: dict[str, Any] = {"query": "What is the capital of France?", "documents": ["Paris is.", "Berlin is not."]}
EXAMPLE_SCORE: dict[str, Any] = {"text_1": "What is the capital of France?", "text_2": ["Paris is.", "Berlin is not."]}
EXAMPLE_CLASSIFY: dict[str, Any] = {"input": "Hello"}
EXAMPLE_POOLING: dict[str, Any] = {"input": "Hello"}
