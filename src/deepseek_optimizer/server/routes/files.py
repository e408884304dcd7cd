"""/v1/files: documents for chats, whose text is stored in memory, and files of batches, which are on disk. Each is accessible
only with the API key that uploaded it or created the batch."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from starlette.responses import FileResponse

from ..batches.file_store import REQUESTS, BatchFile
from ..chat.replies import json_response
from ..documents.file_store import StoredFile
from ..documents.upload import check_origin, digest_of, read_upload_form
from ..http.caller import Caller, cancel_on_disconnect
from ..http.problems import ApiError
from ..openapi import errors
from ..pool.model_pool import ModelPool
from ..protocol.files import DeletedFile, FileList, FileObject, check_fields, file_object, unknown_fields
from ..protocol.files import form as form_schema
from ..state import ServerState

_Id = Annotated[str, Path(max_length=256)]


def add(app: FastAPI, state: ServerState | ModelPool) -> None:
    @app.post(
        "/v1/files",
        response_model=FileObject,
        responses=errors(400, 401, 403, 408, 413, 415, 429, 500, 501, 503, 507),
        openapi_extra=form_schema(state.settings.strict),
        tags=["files"],
    )
    async def upload(request: Request) -> Response:
        """Uploads a document: PDF, Word, HTML, Markdown, source code, any text; with purpose batch, a file of requests."""
        state.check_accepting()
        check_origin(request, state.settings.allow_origins)
        owner, client = request.state.salt, request.state.client
        with state.files.room(owner, client) as room:
            form = await read_upload_form(request, state.settings, room)
            purpose, seconds = check_fields(form.fields, state.settings.strict)
            request.state.ignored_fields.extend(unknown_fields(form.fields))
            if form.name is None:
                raise ApiError(400, "file: is missing", param="file")
            if purpose == REQUESTS:
                add = (owner, f"file-{secrets.token_hex(12)}", form.name, form.data, seconds)
                return json_response(file_object(await asyncio.to_thread(state.batches.files.add, *add)))
            async with cancel_on_disconnect(request):  # otherwise the file would be stored without anybody knowing its id
                caller = Caller(client, len(form.data), state.deadline(time.monotonic()))
                text = await state.reader.read(form.name, form.data, caller)
            size, digest = len(form.data), digest_of(form.name, form.data)
            form.data.clear()
            room.set(0)
            return json_response(file_object(state.files.add(owner, purpose, size, digest, text, seconds)))

    @app.get("/v1/files", response_model=FileList, responses=errors(400, 401, 403), tags=["files"])
    async def files(
        request: Request,
        purpose: Literal["user_data", "assistants", "batch", "batch_output"] | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: Annotated[str | None, Query(max_length=256)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """Lists the files of this API key."""
        owner = request.state.salt
        both: list[StoredFile | BatchFile] = [*state.files.of(owner), *state.batches.files.of(owner)]
        stored = sorted((file for file in both if purpose in (None, file.purpose)), key=lambda file: file.created)
        if order == "desc":
            stored.reverse()
        if after is not None:
            places = [i for i, file in enumerate(stored) if file.id == after]
            if not places:
                raise ApiError(400, "after: there is no such file", param="after")
            stored = stored[places[0] + 1 :]
        data = [file_object(file) for file in stored[:limit]]
        ends: dict[str, Any] = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return json_response({"object": "list", "data": data, **ends, "has_more": len(stored) > limit})

    @app.get("/v1/files/{file_id}", response_model=FileObject, responses=errors(400, 401, 403, 404), tags=["files"])
    async def file(request: Request, file_id: _Id) -> Response:
        """Describes one file."""
        found = state.batches.files.find(request.state.salt, file_id)
        return json_response(file_object(found or state.files.get(request.state.salt, file_id)))

    @app.get(
        "/v1/files/{file_id}/content",
        response_class=Response,
        responses=errors(400, 401, 403, 404) | {200: {"description": "The text of the file.", "content": {"text/plain": {}}}},
        tags=["files"],
    )
    async def content(request: Request, file_id: _Id) -> Response:
        """The text that was read from a document, in UTF-8; positions of citations count its characters. Of a batch's file, the
        file itself."""
        if (found := state.batches.files.find(request.state.salt, file_id)) is not None:
            path = state.batches.files.path(found)
            if not await asyncio.to_thread(path.exists):  # it has just been deleted
                state.files.get(request.state.salt, file_id)
            return FileResponse(path, media_type="application/jsonl", filename=found.name)
        text = state.files.get(request.state.salt, file_id).text.text
        headers = {"Content-Disposition": "attachment", "Content-Type": "text/plain; charset=utf-8"}
        return Response(text.encode(), headers=headers)

    @app.delete("/v1/files/{file_id}", response_model=DeletedFile, responses=errors(400, 401, 403, 404), tags=["files"])
    async def delete(request: Request, file_id: _Id) -> Response:
        """Deletes a file. Answers in progress that use it are completed."""
        if (found := state.batches.files.find(request.state.salt, file_id)) is not None:
            await asyncio.to_thread(state.batches.files.delete, found)
            return json_response({"id": file_id, "object": "file", "deleted": True})
        state.files.delete(request.state.salt, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})
