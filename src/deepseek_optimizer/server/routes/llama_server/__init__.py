"""llama-server's own routes: /completion, /infill, /apply-template and /slots; and /embedding, which encoders have too."""

from __future__ import annotations

from fastapi import FastAPI

from ...state import ServerState
from . import apply_template, completion, completions, embedding, infill, slots

__all__ = ["add", "embedding"]


def add(app: FastAPI, state: ServerState) -> None:
    for route in (completion, completions, infill, apply_template, slots):
        route.add(app, state)
