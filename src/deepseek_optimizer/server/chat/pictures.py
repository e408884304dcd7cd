"""Chats with pictures: they are decoded in worker processes, encoded by the vision tower, and put into the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...engine.pictures import PictureRows
from ..http.caller import Caller
from ..http.problems import ApiError
from ..protocol.sampling import whole_salt
from ..state import ServerState
from .chat_setup import ChatSpec
from .prepared import PreparedChat, prepare_chat


class ChatWithPictures(PreparedChat):
    """A chat in one prompt that has pictures.

    Args:
        chat: the same chat, with a placeholder for each picture in its prompt.
        ids: the tokens of its prompt with those of the pictures.
        rows: of the pictures.
    """

    def __init__(self, chat: PreparedChat, ids: list[int], rows: PictureRows) -> None:
        assert chat.setup is not None
        setup = replace(chat.setup, prompt=replace(chat.setup.prompt, ids=ids, system=None))
        super().__init__(chat.state, chat.chat, setup)
        self._rows = rows

    @property
    def pictures(self) -> PictureRows:
        return self._rows


async def prepare_chat_with_pictures(state: ServerState, chat: ChatSpec, owner: str, caller: Caller) -> PreparedChat:
    """Renders the prompt of a chat with pictures.

    Args:
        state: the server's.
        chat: the chat.
        owner: salt of the request's API key.
        caller: who sent the request.

    Raises:
        ApiError: 400, the model reads text only, or there are too many pictures, or files too.
        RequestError, WorkerLostError, EngineBusyError: see `prepare_chat` and `Pictures.prompt`.
    """
    service = state.pictures
    if service is None:
        raise ApiError(
            400,
            "messages: this model reads text only; parts of type image_url, and other protocols' images, are not supported",
            param="messages",
        )
    if chat.has_files:
        raise ApiError(400, "messages: files and pictures in one chat are not supported", param="messages")
    messages, urls = _taken(chat.messages)
    if len(urls) > state.settings.max_pictures:
        raise ApiError(400, f"messages: at most {state.settings.max_pictures} pictures are accepted", param="messages")
    prepared = await prepare_chat(state, replace(chat, messages=messages), caller)
    ids, rows = await service.prompt(caller, prepared.ids, urls, whole_salt(owner, chat.cache_salt))
    assert rows is not None
    return ChatWithPictures(prepared, ids, rows)


async def prepare_chat_for_counting(state: ServerState, chat: ChatSpec, owner: str, caller: Caller) -> PreparedChat:
    """Renders the prompt of a chat whose tokens are counted. Arguments as those of `prepare_chat_with_pictures`.

    Raises:
        ApiError: 400, the chat has files.
        ApiError, RequestError, WorkerLostError, EngineBusyError: see `prepare_chat` and `prepare_chat_with_pictures`.
    """
    if chat.has_pictures:
        return await prepare_chat_with_pictures(state, chat, owner, caller)
    if chat.has_files:
        raise ApiError(400, "messages: tokens of chats with files cannot be counted; leave the files out", param="messages")
    return await prepare_chat(state, chat, caller)


def _taken(messages: Any) -> tuple[list[Mapping[str, Any]], list[tuple[str, str]]]:
    """The messages with places for pictures, and the field and the URL of each picture."""
    urls: list[tuple[str, str]] = []
    without: list[Mapping[str, Any]] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for j, part in enumerate(content):
                if part["type"] == "image_url":
                    urls.append((f"messages[{i}].content[{j}].image_url", part["image_url"]["url"]))
                    part = {"type": "image"}
                parts.append(part)
            message = {**message, "content": parts}
        without.append(message)
    return without, urls
