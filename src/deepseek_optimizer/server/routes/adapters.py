"""/v1/load_lora_adapter and /v1/unload_lora_adapter: LoRA adapters, loaded while the server runs. Only if the settings allow
it."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.responses import PlainTextResponse

from ..chat.intake import admitted_request
from ..openapi import body_errors, reads
from ..protocol.adapters import EXAMPLE_LOAD, EXAMPLE_UNLOAD, LoadAdapterRequest, UnloadAdapterRequest
from ..state import ServerState


def add(app: FastAPI, state: ServerState) -> None:
    if not state.settings.allow_lora_loading:
        return

    @app.post(
        "/v1/load_lora_adapter",
        response_class=PlainTextResponse,
        responses=body_errors(),
        openapi_extra=reads(LoadAdapterRequest, EXAMPLE_LOAD),
        tags=["models"],
    )
    async def load(request: Request) -> Response:
        """Loads a LoRA adapter, which requests can then name in `model`."""
        async with admitted_request(state, request, LoadAdapterRequest, one=True) as (body, _, caller):
            await state.adapters.load(body.lora_name, body.lora_path, caller, bool(body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post(
        "/v1/unload_lora_adapter",
        response_class=PlainTextResponse,
        responses=body_errors(),
        openapi_extra=reads(UnloadAdapterRequest, EXAMPLE_UNLOAD),
        tags=["models"],
    )
    async def unload(request: Request) -> Response:
        """Unloads a LoRA adapter. Answers that use it already are completed."""
        async with admitted_request(state, request, UnloadAdapterRequest, one=True) as (body, _, _caller):
            state.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
