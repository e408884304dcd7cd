"""/version, /load, /sleep, /wake_up and /is_sleeping."""

from __future__ import annotations

from pydantic import Field

from .base import ResponseModel


class Version(ResponseModel):
    version: str


class QueueLoad(ResponseModel):
    running: int
    waiting: int


class Load(ResponseModel):
    server_load: int = Field(description="Number of admitted requests.")
    running: int = Field(description="Number of requests in the engine's batch.")
    waiting: int = Field(description="Number of requests that wait for the batch.")
    queues: dict[str, QueueLoad] = Field(description="Jobs of the server's other queues.")


class Sleeping(ResponseModel):
    is_sleeping: bool


class Slept(ResponseModel):
    released_bytes: int = Field(description="Size of the cache and of the mapped weights whose memory was released.")
