"""A server whose model runs in several processes, one of which is killed: it answers with an error, and ends."""

from __future__ import annotations

import json
import re

import httpx
import psutil
import pytest

from support.saved_llama import saved_llama
from support.warm_python import DSO, WarmPython


@pytest.mark.parametrize("asked", [True, False], ids=["during a request", "idle"])
def test_a_server_ends_with_an_error_when_a_process_of_its_model_is_killed(byte_tokenizer, tmp_path, asked):
    model = saved_llama(tmp_path / "model", byte_tokenizer, max_position_embeddings=8192)
    options = ("--tensor-parallel", 2, "--threads", 1, "--kv-cache-memory", 1 << 24, "--port", 0)
    with WarmPython(DSO, "serve", model, *options) as server:
        lines = []
        while not (found := re.search(r"address +(http://[0-9.:]+)", lines[-1] if lines else "")):
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
        with httpx.Client(base_url=found[1], timeout=60) as client:
            assert client.get("/health").status_code == 200
            (rank,) = [
                child
                for child in psutil.Process(server.pid).children()
                if any("rank_process" in part for part in child.cmdline())
            ]
            if asked:
                body = {"prompt": "x", "max_tokens": 8000, "temperature": 0, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
                    next(events)
                    rank.kill()
                    *_, error, done = events
                assert done == "[DONE]"
                error = json.loads(error)["error"]
                assert error["code"] == "rank_lost" and "has to restart" in error["message"]
            else:
                rank.kill()
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 2 and "Traceback" not in errors, errors
        last = errors.strip().splitlines()[-1]
        assert (
            last.startswith("dso: the server has ended") and f"rank 1 of 2, process {rank.pid}, was killed by SIGKILL" in last
        )
