"""/v1/load_lora_adapter and /v1/unload_lora_adapter, vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ...engine.adapters import MAX_NAME
from .base import Body, Ignored

_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class LoadAdapterRequest(Body):
    """A LoRA adapter to load."""

    lora_name: _Name = Field(description="What requests will call it in `model`.")
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Its directory, as PEFT writes it: inside the server's --lora-dir, absolute or relative to it."
    )
    load_inplace: bool | None = Field(None, description="Replace an adapter of this name; by default this is an error.")


class UnloadAdapterRequest(Body):
    """A LoRA adapter to unload. Answers that use it already are completed."""

    lora_name: _Name
    lora_int_id: Ignored


EXAMPLE_LOAD: dict[str, Any] = {"lora_name": "my-adapter", "lora_path": "my-adapter"}
EXAMPLE_UNLOAD: dict[str, Any] = {"lora_name": "my-adapter"}
