"""/props, with the fields of llama-server's that mean something here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .base import ResponseModel


class DefaultParams(ResponseModel):
    """Sampling parameters of a request that gives none."""

    n_predict: int = Field(description="Maximum number of new tokens.")
    max_tokens: int = Field(description="The same.")
    seed: int = Field(description="-1: random.")
    temperature: float
    top_k: int = Field(description="0: all.")
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: list[str]
    ignore_eos: bool
    stream: bool


class DefaultSettings(ResponseModel):
    n_ctx: int = Field(description="Context length in tokens.")
    params: DefaultParams


class Modalities(ResponseModel):
    vision: bool
    audio: Literal[False]


class Props(ResponseModel):
    default_generation_settings: DefaultSettings
    sampling_without_thinking: dict[str, Any] | None = Field(
        description="Sampling parameters that differ for answers without reasoning; null: none."
    )
    total_slots: int = Field(description="Maximum number of concurrent answers.")
    model_alias: str = Field(description="Name of the model, as in /v1/models.")
    model_path: str = Field(description="Path or name by which the model was loaded.")
    chat_template: str = Field(description="Empty if the model has none.")
    bos_token: str
    eos_token: str
    modalities: Modalities
    build_info: str
    is_sleeping: bool
