"""The routes of Ollama's API, under /api."""

from __future__ import annotations

from fastapi import FastAPI

from ...state import ServerState
from . import chat, embed, generate, models


def add(app: FastAPI, state: ServerState) -> None:
    for route in (chat, generate, embed, models):
        route.add(app, state)
