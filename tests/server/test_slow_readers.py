"""Slots in the queue belong to work, not to clients: a client that does not read blocks nobody."""

from __future__ import annotations

import json
import socket

from support.live_server import wait_for


def test_a_client_that_does_not_read_returns_its_slot(make_server):
    live = make_server(script=lambda request: "long " * 20_000, capacity=1, context=1 << 20)
    body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": 100_000}).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", live.port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    sock.sendall(head % len(body) + body)
    wait_for(lambda: live.engine.steps > 10)
    wait_for(lambda: live.engine.running == 0, 60)
    wait_for(lambda: live.engine.admitted == 0)
    assert live.client.post("/v1/completions", json={"prompt": "me too", "max_tokens": 5}).status_code == 200
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")  # its answer is still available
    sock.close()
