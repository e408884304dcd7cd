"""Batches of a running server: uploading requests, creating a batch and waiting for its end."""

from __future__ import annotations

import json

import httpx

from .live_server import wait_for

COMPLETIONS = "/v1/completions"


def lines(count: int, **body) -> bytes:
    """A file of completions; `body`: fields of each."""
    requests = (
        {"custom_id": f"r{n}", "method": "POST", "url": COMPLETIONS, "body": {"prompt": f"p {n}", **body}} for n in range(count)
    )
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def upload(client: httpx.Client, data: bytes, headers=None, name="requests.jsonl", **fields) -> str:
    sent = client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "batch", **fields}, headers=headers)
    assert sent.status_code == 200, sent.text
    return sent.json()["id"]


def create(client: httpx.Client, file: str, headers=None, **fields) -> dict:
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h", **fields}
    sent = client.post("/v1/batches", json=body, headers=headers)
    assert sent.status_code == 200, sent.text
    return sent.json()


def ended(client: httpx.Client, batch: dict, headers=None) -> dict:
    """The batch when it has ended."""

    def get() -> dict:
        return client.get(f"/v1/batches/{batch['id']}", headers=headers).json()

    wait_for(lambda: get()["status"] in ("completed", "failed", "expired", "cancelled"), 20)
    return get()


def content(client: httpx.Client, file: str, headers=None) -> list[dict]:
    sent = client.get(f"/v1/files/{file}/content", headers=headers)
    assert sent.status_code == 200, sent.text
    return [json.loads(line) for line in sent.content.splitlines()]
