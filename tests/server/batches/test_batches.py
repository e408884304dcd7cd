"""/v1/batches: files of requests, answered in the background."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from deepseek_optimizer.batch.results import Results
from deepseek_optimizer.server.batches.run import Runner
from deepseek_optimizer.server.keys import ApiKeys
from deepseek_optimizer.server.settings import ServerSettings
from support.batches import COMPLETIONS, content, create, ended, lines, upload
from support.live_server import assert_error, wait_for


@pytest.fixture
def server(make_server):
    return make_server()


def test_openai_client(server):
    """A batch with the openai package: answers equal those of the endpoint, and a wrong request does not stop the others."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    wrong = {"custom_id": "wrong", "method": "POST", "url": COMPLETIONS, "body": {"prompt": "x", "temperature": -1}}
    data = lines(40, max_tokens=30, seed=3) + json.dumps(wrong).encode()
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    assert (file.purpose, file.bytes, file.filename) == ("batch", len(data), "requests.jsonl")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h", metadata={"name": "nightly"}
    )
    assert batch.status in ("validating", "in_progress") and batch.expires_at == batch.created_at + 86_400
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 20)
    batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (41, 40, 1) and batch.metadata == {"name": "nightly"}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"r{n}" for n in range(40)]
    for n, answer in enumerate(answers):
        plain = client.completions.create(model="fake-model", prompt=f"p {n}", max_tokens=30, seed=3)
        assert answer["response"]["body"]["choices"][0]["text"] == plain.choices[0].text
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert [error["custom_id"] for error in errors] == ["wrong"] and errors[0]["response"]["status_code"] == 400
    assert [one.id for one in client.batches.list()] == [batch.id]
    listed = {one.id: one for one in client.files.list()}
    assert listed.keys() == {file.id, batch.output_file_id, batch.error_file_id}
    assert listed[batch.output_file_id].purpose == "batch_output"
    assert [one.id for one in client.files.list(purpose="batch")] == [file.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


def test_responses(server):
    """Answers equal those of the endpoint, and none is stored."""
    data = b"".join(
        json.dumps({"custom_id": f"r{n}", "url": "/v1/responses", "body": {"input": f"p {n}", "seed": 3}}).encode() + b"\n"
        for n in range(5)
    )
    batch = ended(server.client, create(server.client, upload(server.client, data), endpoint="/v1/responses"))
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    for n, answer in enumerate(content(server.client, batch["output_file_id"])):
        body = answer["response"]["body"]
        plain = server.client.post("/v1/responses", json={"input": f"p {n}", "seed": 3, "store": False}).json()
        assert body["output"][0]["content"] == plain["output"][0]["content"] and body["store"] is False
        assert body["created_at"] == batch["created_at"] and body["id"].startswith("resp_")
        assert server.client.get(f"/v1/responses/{body['id']}").status_code == 404


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"", None, "there are no requests"),
        (b"{}\nnot JSON\n", 1, "must be a text of 1 to 512 characters"),
        (lines(2) + b"not JSON\n", 3, "not valid JSON"),
        (lines(1) + lines(1), 2, "'r0' is the name of line 1 too"),
        (lines(1).replace(b"/v1/completions", b"/v1/embeddings"), None, "but the batch is for /v1/completions"),
        (
            b'{"custom_id": "a", "url": "/v1/responses", "body": {"input": "x", "store": true}}',
            1,
            "are in its output and are not stored",
        ),
    ],
)
def test_wrong_files(server, data, line, message):
    batch = ended(server.client, create(server.client, upload(server.client, data or b"\n")))
    (error,) = batch["errors"]["data"]
    assert batch["status"] == "failed" and batch["failed_at"] and batch["output_file_id"] is None
    assert error["line"] == line and message in error["message"] and ".jsonl" not in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-../../etc"}, "input_file_id"),
        ({"endpoint": "/v1/messages"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"x": 1}}, "metadata.x"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
def test_wrong_requests(live, refused, change, param):
    refused("/v1/batches", {"input_file_id": "x", "endpoint": COMPLETIONS, "completion_window": "24h", **change}, 400, param)


def test_a_document_is_no_file_of_requests(server, refused):
    sent = server.client.post("/v1/files", files={"file": ("a.txt", b"text")}, data={"purpose": "user_data"})
    body = {"input_file_id": sent.json()["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    assert_error(server.client.post("/v1/batches", json=body), 400, "input_file_id")


def test_cancelled(make_server):
    """A cancelled batch keeps the answers that it has; the next one begins."""
    server = make_server(step_seconds=0.005, capacity=4)
    first = create(server.client, upload(server.client, lines(500, max_tokens=4)))
    second = create(server.client, upload(server.client, lines(3, max_tokens=1)))
    wait_for(lambda: server.client.get(f"/v1/batches/{first['id']}").json()["request_counts"]["completed"] > 3)
    waiting = server.client.get(f"/v1/batches/{second['id']}").json()
    assert waiting["status"] == "validating"
    cancelled = server.client.post(f"/v1/batches/{first['id']}/cancel")
    assert cancelled.json()["status"] in ("cancelling", "finalizing", "cancelled") and cancelled.json()["cancelling_at"]
    first = ended(server.client, first)
    assert first["status"] == "cancelled" and 3 < first["request_counts"]["completed"] < 500
    answers = content(server.client, first["output_file_id"])
    assert len(answers) == first["request_counts"]["completed"] and first["error_file_id"] is None
    assert_error(server.client.post(f"/v1/batches/{first['id']}/cancel"), 409)
    assert ended(server.client, second)["status"] == "completed"


def test_expired(make_server):
    """Requests that are not answered in time are named in the file of errors."""
    server = make_server(step_seconds=0.005, capacity=4)
    batches = server.app.state.server.batches
    batch = create(server.client, upload(server.client, lines(500, max_tokens=4)))
    wait_for(lambda: server.client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] > 3)

    def restart_later() -> None:  # as a server that was stopped for a day
        batches.get("", batch["id"]).expires = 0

    server.call(restart_later)
    server.call(lambda: batches._tasks[""].cancel())
    wait_for(lambda: not batches.running)
    server.call(lambda: batches.start(server.app, lambda: True, 2, 1 << 20))
    batch = ended(server.client, batch)
    assert batch["status"] == "expired" and batch["expired_at"]
    answers, errors = content(server.client, batch["output_file_id"]), content(server.client, batch["error_file_id"])
    assert {e["error"]["code"] for e in errors} == {"batch_expired"} and {e["response"] for e in errors} == {None}
    assert sorted(e["custom_id"] for e in [*answers, *errors]) == sorted(f"r{n}" for n in range(500))


def test_keys(make_server):
    """A batch and its files belong to the API key that created it; its requests need no key of their own."""
    server = make_server(ServerSettings(keys=ApiKeys(["one", "two"])))
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    file = upload(server.client, lines(3, max_tokens=2), one)
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
    assert_error(server.client.post("/v1/batches", json=body, headers=two), 400, "input_file_id")
    batch = ended(server.client, create(server.client, file, one), one)
    assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 3
    for path in (f"/v1/batches/{batch['id']}", f"/v1/files/{batch['output_file_id']}/content", f"/v1/files/{file}"):
        assert server.client.get(path, headers=one).status_code == 200
        assert_error(server.client.get(path, headers=two), 404)
    assert_error(server.client.post(f"/v1/batches/{batch['id']}/cancel", headers=two), 404)
    assert server.client.get("/v1/batches", headers=two).json()["data"] == []
    assert server.client.get("/v1/files", headers=two).json()["data"] == []


def test_limits(make_server):
    server = make_server(
        ServerSettings(
            max_batch_bytes_per_client=3000, max_batch_bytes_total=4000, max_batches_per_client=1, max_files_per_client=3
        )
    )
    upload(server.client, b"x" * 2000)
    form = {"files": {"file": ("a", b"x" * 1500)}, "data": {"purpose": "batch"}}
    assert_error(server.client.post("/v1/files", **form), 413, "file")
    file = upload(server.client, lines(1))
    server.call(lambda: setattr(server.app.state.server.batches, "_runner", None))  # nothing runs
    create(server.client, file)
    upload(server.client, lines(1))
    assert_error(server.client.post("/v1/files", **form), 400, "file")
    server.client.delete(f"/v1/files/{file}")
    file = server.client.get("/v1/files?purpose=batch").json()["data"][0]["id"]
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
    assert_error(server.client.post("/v1/batches", json=body), 429)


@pytest.mark.parametrize("cut", [False, True])
def test_a_stopped_server_continues_its_batches(make_server, tmp_path, cut):
    """Each request is answered once, over two servers with the same state directory."""
    settings, calls, lock = ServerSettings(state_dir=tmp_path, drain_seconds=1), [], threading.Lock()

    def script(request):
        with lock:
            calls.append(bytes(request.prompt))
        return "an answer"

    first = make_server(settings, script=script, step_seconds=0.002, capacity=4)
    batch = create(first.client, upload(first.client, lines(200, max_tokens=3)))
    wait_for(lambda: first.client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] > 20)
    first.__exit__()
    partial = next(tmp_path.glob("batches/jobs/*.partial"))
    done = len(partial.read_bytes().splitlines()) - 1
    if cut:  # as a power failure may leave it
        partial.write_bytes(partial.read_bytes()[:-7])
    (tmp_path / "batches/jobs/batch_damaged.json").write_text("{")
    (tmp_path / "batches/files/file-damaged.json").write_text("{}")
    second = make_server(settings, script=script)
    batch = ended(second.client, batch)
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    answers = content(second.client, batch["output_file_id"])
    assert [answer["custom_id"] for answer in answers] == [f"r{n}" for n in range(200)]
    assert len({answer["id"] for answer in answers}) == 200
    assert 20 < done < 200 and 200 + cut <= len(calls) <= 206  # those in flight when it stopped are answered again
    assert [one["id"] for one in second.client.get("/v1/batches").json()["data"]] == [batch["id"]]
    wait_for(lambda: not list(tmp_path.glob("batches/jobs/*.partial")))


def test_expired_files_and_old_batches_are_deleted(make_server):
    server = make_server()
    batches = server.app.state.server.batches
    file = upload(
        server.client, lines(2, max_tokens=1), **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    )
    batch = ended(server.client, create(server.client, file, output_expires_after={"anchor": "created_at", "seconds": 7200}))
    start = batch["created_at"]
    at = {"now": start}
    batches._clock = batches.files._clock = lambda: at["now"]
    for hours, left in ((0.9, 2), (1.5, 1), (2.5, 0)):
        at["now"] = start + 3600 * hours
        server.wait(batches.sweep)
        assert len(server.client.get("/v1/files").json()["data"]) == left
    assert not list(batches.files._folder.iterdir())
    assert server.client.get(f"/v1/batches/{batch['id']}").status_code == 200
    at["now"] = start + 40 * 86_400
    server.wait(batches.sweep)
    assert_error(server.client.get(f"/v1/batches/{batch['id']}"), 404)


def test_clients_come_first(make_server):
    """Requests of batches have the lowest priority, whatever they ask for; what clients send is not changed."""
    seen = []

    def script(request):
        seen.append(request.priority)
        return "x"

    server = make_server(script=script)
    ended(server.client, create(server.client, upload(server.client, lines(1) + lines(2, priority="7").split(b"\n", 1)[1])))
    server.client.post(COMPLETIONS, json={"prompt": "x", "priority": 7})
    assert sorted(seen) == [7, 1000, 1000]


def test_a_sleeping_server_answers_later(make_server):
    server = make_server(ServerSettings(sleep_mode=True))
    state, file = server.app.state.server, upload(server.client, lines(3, max_tokens=1))
    server.call(lambda: setattr(state, "sleep_state", "weights_offloaded"))
    batch = create(server.client, file)
    wait_for(lambda: server.client.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress")
    assert server.client.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] == 0
    server.call(lambda: setattr(state, "sleep_state", "awake"))
    assert ended(server.client, batch)["request_counts"]["completed"] == 3


def test_an_internal_error_ends_the_batch(server, monkeypatch):
    """The log has the details; the next batch is answered."""

    async def fail(*_):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr("deepseek_optimizer.server.batches.run.answer_all", fail)
        batch = ended(server.client, create(server.client, upload(server.client, lines(1))))
    assert batch["status"] == "failed" and [one["code"] for one in batch["errors"]["data"]] == ["internal_error"]
    assert "secret" not in json.dumps(batch)
    assert ended(server.client, create(server.client, upload(server.client, lines(1))))["status"] == "completed"


def test_a_full_disk_delays_the_batch(server, monkeypatch):
    """Results that cannot be written do not fail the batch: it continues with the next one."""
    failing = {"now": True}
    add = Results.add

    def full(results, index, line):
        if failing["now"]:
            raise OSError(28, "No space left on device")
        add(results, index, line)

    monkeypatch.setattr(Results, "add", full)
    file = upload(server.client, lines(3, max_tokens=1))
    first = create(server.client, file)
    batches = server.app.state.server.batches
    wait_for(lambda: not batches.running)
    assert server.client.get(f"/v1/batches/{first['id']}").json()["status"] == "in_progress"
    failing["now"] = False
    second = create(server.client, file)
    assert [ended(server.client, one)["request_counts"]["completed"] for one in (first, second)] == [3, 3]


def test_batches_one_after_the_other(server):
    """A batch that is created when the one before has just ended is run, too."""
    file = upload(server.client, lines(1, max_tokens=1))
    for _ in range(40):
        batch = create(server.client, file)
        while server.client.get(f"/v1/batches/{batch['id']}").json()["status"] != "completed":
            pass
    assert len(server.client.get("/v1/batches?limit=100").json()["data"]) == 40


def test_a_waiting_batch_is_cancelled_at_once(make_server):
    server = make_server(step_seconds=0.005, capacity=4)
    first = create(server.client, upload(server.client, lines(500, max_tokens=4)))
    second = create(server.client, upload(server.client, lines(3)))
    assert server.client.post(f"/v1/batches/{second['id']}/cancel").json()["status"] == "cancelled"
    third = create(server.client, upload(server.client, lines(3)))
    batches = server.app.state.server.batches
    batches.get("", third["id"]).expires = 0
    server.wait(batches.sweep)
    assert server.client.get(f"/v1/batches/{third['id']}").json()["status"] == "expired"
    assert server.client.get(f"/v1/batches/{first['id']}").json()["status"] == "in_progress"


def test_requests_are_kept_until_the_batch_ends(make_server, tmp_path):
    """The file of a batch that runs may be deleted."""
    server = make_server(ServerSettings(state_dir=tmp_path), step_seconds=0.005, capacity=4)
    file = upload(server.client, lines(30, max_tokens=2))
    first, second = create(server.client, file), create(server.client, file)
    server.client.delete(f"/v1/files/{file}")
    assert [ended(server.client, one)["request_counts"]["completed"] for one in (first, second)] == [30, 30]
    wait_for(lambda: {path.suffix for path in tmp_path.glob("batches/jobs/*")} == {".json"})


def test_a_key_that_is_not_accepted_any_more(make_server, tmp_path):
    """A server that is started without the key of a batch does not run it; stray files are deleted."""
    keys = {"Authorization": "Bearer one"}
    first = make_server(ServerSettings(state_dir=tmp_path, keys=ApiKeys(["one"])), step_seconds=0.005, capacity=4)
    batch = create(first.client, upload(first.client, lines(500, max_tokens=4), keys), keys)
    wait_for(lambda: first.client.get(f"/v1/batches/{batch['id']}", headers=keys).json()["status"] == "in_progress")
    first.__exit__()
    (tmp_path / "batches/files/file-stray.jsonl").write_text("killed during the upload")
    second = make_server(ServerSettings(state_dir=tmp_path, keys=ApiKeys(["two"])))
    batches = second.app.state.server.batches
    (stopped,) = batches._batches.values()
    assert stopped.status == "failed" and stopped.errors[0]["code"] == "invalid_api_key" and not batches.running
    assert not (tmp_path / "batches/files/file-stray.jsonl").exists()


def test_creating_many_at_once(make_server):
    """The limit holds for batches that are created at the same time."""
    server = make_server(ServerSettings(max_batches_per_client=3))
    file = upload(server.client, lines(1))
    server.call(lambda: setattr(server.app.state.server.batches, "_runner", None))  # nothing runs
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda _: server.client.post("/v1/batches", json=body).status_code, range(12)))
    assert sorted(statuses) == [200] * 3 + [429] * 9


@pytest.mark.parametrize("data", [lines(1, suffix="x" * 3000), lines(1).replace(b'"r0"', b'"' + b"r" * 600 + b'"')])
def test_long_lines_and_names(make_server, data):
    server = make_server(ServerSettings(max_body_bytes=2000))
    (error,) = ended(server.client, create(server.client, upload(server.client, data)))["errors"]["data"]
    assert error["line"] == 1 and len(error["message"]) < 300


def test_results_that_exceed_the_limit(make_server):
    """The batch fails, keeps the answers it has, and its results never exceed the limit by more than those in flight."""
    limit = 20_000
    server = make_server(ServerSettings(max_batch_bytes_per_client=limit), step_seconds=0.001, capacity=4)
    data = lines(150, max_tokens=1)
    batch = ended(server.client, create(server.client, upload(server.client, data)))
    (error,) = batch["errors"]["data"]
    assert batch["status"] == "failed" and batch["failed_at"] and error["code"] == "file_storage"
    answers = content(server.client, batch["output_file_id"])
    assert 5 < len(answers) == batch["request_counts"]["completed"] < 150
    sizes = [file["bytes"] for file in server.client.get("/v1/files").json()["data"]]
    assert limit / 2 < sum(sizes) < limit + 5 * max(len(json.dumps(answer)) for answer in answers)
    for file in server.client.get("/v1/files").json()["data"]:
        server.client.delete(f"/v1/files/{file['id']}")
    assert ended(server.client, create(server.client, upload(server.client, lines(3))))["status"] == "completed"


def test_the_last_result_does_not_fail_a_batch(make_server):
    data, sizes = lines(3, max_tokens=1, seed=1), []
    for limit in (1 << 20, 0):
        server = make_server(ServerSettings(max_batch_bytes_per_client=limit or sum(sizes) - 1))
        batch = ended(server.client, create(server.client, upload(server.client, data)))
        sizes = [file["bytes"] for file in server.client.get("/v1/files").json()["data"]]
        assert batch["status"] == "completed" and len(sizes) == 2


def test_several_answers_take_several_places(make_server):
    """Half of the engine's places are for batches, whatever `n` is."""
    server = make_server(step_seconds=0.002, capacity=8)
    batch = create(server.client, upload(server.client, lines(20, n=2, max_tokens=20)))
    most, status = 0, "in_progress"
    while status in ("validating", "in_progress", "finalizing"):
        most = max(most, server.engine.admitted)
        status = server.client.get(f"/v1/batches/{batch['id']}").json()["status"]
    assert status == "completed" and 0 < most <= max(1, server.engine.max_running // 2)


def test_a_server_that_stops_waits_for_the_file_it_writes(make_server, tmp_path, monkeypatch):
    """Results that are being written when the server stops are complete afterwards."""
    begun, release, ended_writing = threading.Event(), threading.Event(), threading.Event()
    write = Runner._write

    def slow(*arguments):
        begun.set()
        release.wait(10)
        write(*arguments)
        ended_writing.set()

    monkeypatch.setattr(Runner, "_write", slow)
    server = make_server(ServerSettings(state_dir=tmp_path))
    batch = create(server.client, upload(server.client, lines(3, max_tokens=1)))
    assert begun.wait(10)
    threading.Timer(0.2, release.set).start()
    server.__exit__()
    assert ended_writing.is_set()
    monkeypatch.undo()
    again = ended((second := make_server(ServerSettings(state_dir=tmp_path))).client, batch)
    assert again["status"] == "completed" and len(content(second.client, again["output_file_id"])) == 3
