"""llama-server's own routes: /completion, /infill and /apply-template."""

from __future__ import annotations

from fastapi import FastAPI

from ...state import ServerState
from . import apply_template, completion, infill


def add(app: FastAPI, state: ServerState) -> None:
    for route in (completion, infill, apply_template):
        route.add(app, state)
