"""Stored responses: conversations that continue them, retrieval, deletion, generation in the background, restarts."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.server.stored_responses.database import ResponseDatabase, Row
from support.live_server import assert_error, wait_for
from support.warm_python import WarmPython

PATH = "/v1/responses"
TESTS = Path(__file__).parents[1]


def ask(client, **body):
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(live) -> str:
    return live.engine.tokenizer.decode(live.engine.seen[-1].prompt)


def text_of(response) -> str:
    return response["output"][0]["content"][0]["text"]


def test_a_conversation_continues_stored_responses(live, client):
    first = ask(client, input="one", instructions="Be brief")
    second = ask(client, input=[{"role": "user", "content": "two"}], previous_response_id=first["id"])
    third = ask(client, input="three", previous_response_id=second["id"], store=False, instructions="Be kind")
    assert prompt_of(live) == (
        f"<|system|>Be kind<|end|><|user|>one<|end|><|assistant|>{text_of(first)}<|end|><|user|>two<|end|>"
        f"<|assistant|>{text_of(second)}<|end|><|user|>three<|end|><|assistant|>"
    )
    assert third["previous_response_id"] == second["id"] and third["store"] is False and first["store"] is True
    assert client.get(f"{PATH}/{first['id']}").json() == first
    assert_error(client.get(f"{PATH}/{third['id']}"), 404)
    assert_error(client.post(PATH, json={"input": "x", "previous_response_id": third["id"]}), 400, "previous_response_id")


def test_a_stream_is_stored_before_its_last_event(client):
    stream = client.post(PATH, json={"input": "one", "stream": True}).text
    id = re.search(r'"id":"(resp_[0-9a-f]+)"', stream)[1]
    stored = client.get(f"{PATH}/{id}").json()
    assert stored["status"] == "completed" and text_of(stored) in ask(client, input="one")["output"][0]["content"][0]["text"]


def test_input_items(client):
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    id = ask(client, input=items)["id"]
    page = client.get(f"{PATH}/{id}/input_items", params={"limit": 2}).json()
    assert [item["content"] for item in page["data"]] == ["4", "3"] and page["has_more"] and page["object"] == "list"
    rest = client.get(f"{PATH}/{id}/input_items", params={"order": "asc", "after": page["last_id"]}).json()
    assert [item["content"] for item in rest["data"]] == ["4"] and not rest["has_more"]
    assert_error(client.get(f"{PATH}/{id}/input_items", params={"after": "msg_0"}), 400, "after")


def test_deletion(client):
    first = ask(client, input="one")
    second = ask(client, input="two", previous_response_id=first["id"])
    assert client.delete(f"{PATH}/{first['id']}").json() == {"id": first["id"], "object": "response", "deleted": True}
    missing = client.get(f"{PATH}/{first['id']}")
    assert_error(missing, 404)
    assert f"Response with id '{first['id']}' not found." in missing.text
    assert_error(client.delete(f"{PATH}/{first['id']}"), 404)
    assert client.get(f"{PATH}/{second['id']}").status_code == 200
    gone = client.post(PATH, json={"input": "x", "previous_response_id": second["id"]})
    assert_error(gone, 400, "previous_response_id")


def test_keys_do_not_share_responses(make_server):
    live = make_server(ServerSettings(keys=ApiKeys(["alpha", "beta"])))
    alpha, beta = ({"Authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
    id = live.client.post(PATH, json={"input": "one"}, headers=alpha).json()["id"]
    assert live.client.get(f"{PATH}/{id}", headers=alpha).status_code == 200
    for method, path in (("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("POST", "/cancel")):
        assert_error(live.client.request(method, f"{PATH}/{id}{path}", headers=beta), 404)
    assert_error(live.client.post(PATH, json={"input": "x", "previous_response_id": id}, headers=beta), 400)


def test_background(make_server):
    live = make_server(step_seconds=0.01, script=lambda request: "x" * 60)
    queued = ask(live.client, input="one", background=True)
    assert queued["status"] == "queued" and queued["background"] and queued["output"] == []
    address = f"{PATH}/{queued['id']}"
    early = live.client.post(PATH, json={"input": "two", "previous_response_id": queued["id"]})
    assert_error(early, 400, "previous_response_id")
    wait_for(lambda: live.client.get(address).json()["status"] == "completed")
    done = live.client.get(address).json()
    assert text_of(done) == "x" * 60 and done["usage"]["output_tokens"] == 61
    assert live.client.post(f"{address}/cancel").json() == done
    wait_for(lambda: live.engine.admitted == 0)


def test_cancelling_and_deleting_in_the_background(make_server):
    live = make_server(step_seconds=0.01, script=lambda request: "x" * 3000)
    first, second = (ask(live.client, input="one", background=True)["id"] for _ in range(2))
    cancelled = live.client.post(f"{PATH}/{first}/cancel").json()
    assert cancelled["status"] == "cancelled" == live.client.get(f"{PATH}/{first}").json()["status"]
    assert live.client.delete(f"{PATH}/{second}").status_code == 200
    wait_for(lambda: live.engine.admitted == 0 and live.engine.running == 0)
    id = ask(live.client, input="one", max_output_tokens=3)["id"]
    refused = live.client.post(f"{PATH}/{id}/cancel")
    assert_error(refused, 400)
    assert "Cannot cancel a synchronous response." in refused.text  # as OpenAI says it


def test_a_failure_in_the_background_is_stored(make_server):
    live = make_server(step_seconds=0.01, script=lambda request: "x" * 3000)
    id = ask(live.client, input="one", background=True)["id"]
    wait_for(lambda: live.engine.running == 1)
    live.call(live.engine.fail)
    wait_for(lambda: live.client.get(f"{PATH}/{id}").json()["status"] == "failed")
    assert "secret" not in live.client.get(f"{PATH}/{id}").text


def row(id="a", owner="me", previous=None, status="completed", size=100):
    return Row(id, owner, previous, status, False, b"[]", b'{"output":[],"pad":"%s"}' % (b"x" * size))


@pytest.fixture
def database(tmp_path):
    made = ResponseDatabase(tmp_path / "state", 10_000, 6_000, 3600)
    yield made
    made.close()


def test_the_oldest_responses_give_way(database):
    for number in range(20):
        database.put(row(f"a{number}", size=500))
    kept = [number for number in range(20) if database.get("me", f"a{number}")]
    assert 3 < len(kept) < 7 and kept == list(range(20 - len(kept), 20))
    for number in range(2):
        database.put(row(f"b{number}", "you", size=2000))
    assert database.get("you", "b0") and database.get("you", "b1")
    assert not database.get("me", f"a{kept[0]}")  # the owner with the most bytes makes room
    database.update("you", "b1", "completed", b"x" * 20_000)
    assert database.get("you", "b1") is None  # alone over the limit


def test_a_conversation_is_used_as_a_whole(database):
    for number in range(4):
        database.put(row(f"a{number}", previous=f"a{number - 1}" if number else None))
    database.put(row("other"))
    assert [one.id for one in database.conversation("me", "a3")] == ["a0", "a1", "a2", "a3"]
    assert database.conversation("you", "a3") == []
    database.delete("me", "a1")
    assert [one.id for one in database.conversation("me", "a3")] == ["a2", "a3"]


def test_expiry(database):
    database.put(row("a"))
    database.sweep()
    assert database.get("me", "a")
    database._seconds = -1
    database.sweep()
    assert database.get("me", "a") is None and not database._held


def test_a_new_process_finds_what_was_stored(tmp_path):
    first = ResponseDatabase(tmp_path, 10_000, 10_000, 3600)
    first.put(row("a"))
    first.put(row("b", status="in_progress"))
    with pytest.raises(ConfigError, match="in use"):
        ResponseDatabase(tmp_path, 10_000, 10_000, 3600)
    first.close()
    again = ResponseDatabase(tmp_path, 10_000, 10_000, 3600)
    assert again.get("me", "a").body == row("a").body and again.get("me", "b").status == "failed"
    assert again._held == {"me": row("a").size + row("b").size}
    assert (tmp_path / "responses.db").stat().st_mode & 0o077 == 0
    again.close()


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "responses.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="state-dir"):
        ResponseDatabase(tmp_path, 10_000, 10_000, 3600)
    with pytest.raises(ConfigError, match="state-dir"):
        ResponseDatabase(tmp_path / "responses.db", 10_000, 10_000, 3600)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from transformers import AutoTokenizer
from support.fake_engine import FakeEngine
from deepseek_optimizer.server.run import listener, serve
from deepseek_optimizer.server.settings import ServerSettings

engine = FakeEngine(AutoTokenizer.from_pretrained({model!r}), step_seconds=0.001)
settings = ServerSettings(port=0, state_dir=Path({folder!r}))
serve(engine, settings, listener("127.0.0.1", 0), lambda host, port: print(f"port {{port}}", flush=True))
"""


def test_a_killed_server_continues_its_conversations(tiny_model, tmp_path):
    script = SCRIPT.format(tests=str(TESTS), model=str(tiny_model), folder=str(tmp_path / "state"))

    def start():
        process = WarmPython(script)
        port = re.fullmatch(r"port (\d+)\n", process.stdout.readline())[1]
        return process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def kill(process):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

    process, client = start()
    try:
        first = ask(client, input="one")
        long = ask(client, input="two", background=True)
    finally:
        kill(process)
    process, client = start()
    try:
        assert client.get(f"{PATH}/{first['id']}").json() == first
        assert client.get(f"{PATH}/{long['id']}").json()["status"] in ("failed", "completed")
        second = ask(client, input="three", previous_response_id=first["id"])
        whole = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": text_of(first)},
            {"role": "user", "content": "three"},
        ]
        assert text_of(second) == text_of(ask(client, input=whole))
    finally:
        kill(process)
