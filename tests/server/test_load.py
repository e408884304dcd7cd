"""Full queues, deadlines, and engines that fail: every request gets exactly one answer."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_optimizer.server.settings import ServerSettings
from support.live_server import assert_error, wait_for

ASKED = {"prompt": "x", "max_tokens": 20}


def test_a_burst_of_ten_times_the_capacity(make_server):
    live = make_server(capacity=8, step_seconds=0.001)
    tokenized = []
    lane = live.app.state.server._tokenizing.short
    real = lane.tokenizer
    lane.tokenizer = lambda text, **options: tokenized.append(text) or real(text, **options)
    live.engine.frozen = True

    def ask(i):
        return live.client.post("/v1/completions", json={**ASKED, "prompt": f"question {i}", "stream": i % 2 == 0})

    with ThreadPoolExecutor(80) as pool:
        futures = [pool.submit(ask, i) for i in range(80)]
        wait_for(lambda: sum(f.done() for f in futures) == 72)
        live.engine.frozen = False
        answers = [f.result() for f in futures]
    counts = Counter(answer.status_code for answer in answers)
    assert counts == {200: 8, 429: 72} and len(tokenized) == 8
    for answer in answers:
        if answer.status_code == 429:
            assert_error(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"
    assert live.client.post("/v1/completions", json=ASKED).status_code == 200


def test_slots_are_counted_by_answers(make_server):
    live = make_server(capacity=4)
    live.engine.frozen = True
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(live.client.post, "/v1/completions", json={**ASKED, "n": 3})
        wait_for(lambda: live.engine.admitted == 3)
        assert_error(live.client.post("/v1/completions", json={**ASKED, "n": 2}), 429)
        assert_error(live.client.post("/v1/completions", json={**ASKED, "prompt": ["a", "b"]}), 429)
        live.engine.frozen = False
        assert first.result().status_code == 200
    wait_for(lambda: live.engine.admitted == 0)


@pytest.mark.parametrize(
    "body", [{"prompt": 1}, {"prompt": [10**6]}, {"prompt": "x", "model": "other"}, {"prompt": "x" * 5000}]
)
def test_a_rejected_request_holds_no_slot(live, body):
    for _ in range(live.engine.capacity + 1):
        assert live.client.post("/v1/completions", json=body).status_code in (400, 404)
    assert live.engine.admitted == 0


def test_a_request_with_a_rejected_second_prompt_leaves_nothing_running(live):
    assert_error(live.client.post("/v1/completions", json={"prompt": [[1], [10**6]]}), 400, "prompt")
    wait_for(lambda: live.engine.running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_passes(make_server, stream):
    live = make_server(ServerSettings(request_seconds=0.2))
    live.engine.frozen = True
    actual = live.client.post("/v1/completions", json={**ASKED, "stream": stream})
    assert_error(actual, 504)
    assert actual.headers["x-should-retry"] == "false" and live.engine.ended == ["deadline"]
    live.engine.frozen = False
    assert live.client.post("/v1/completions", json=ASKED).status_code == 200


def test_the_deadline_passes_in_the_middle_of_a_stream(make_server):
    live = make_server(ServerSettings(request_seconds=0.3), step_seconds=0.01)
    actual = live.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True})
    events = actual.text.split("\n\n")
    assert actual.status_code == 200 and len(events) > 3
    assert "time" in json.loads(events[-3][6:])["error"]["message"] and events[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_request_does_not_affect_others(make_server, stream):
    live = make_server()
    live.engine.frozen = True
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(live.client.post, "/v1/completions", json={**ASKED, "prompt": "first", "stream": stream})
        wait_for(lambda: live.engine.running == 1)
        second = pool.submit(live.client.post, "/v1/completions", json={**ASKED, "prompt": "second"})
        wait_for(lambda: live.engine.running == 2)
        live.call(live.engine.fail)
        assert_error(first.result(), 500)
        assert "secret" not in first.result().text
        live.engine.frozen = False
        assert second.result().status_code == 200
    assert live.client.get("/health").status_code == 200


def test_the_engine_dies(make_server):
    live = make_server(step_seconds=0.005)
    statuses, streamed = [], []

    def ask():
        statuses.append(live.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3000, "ignore_eos": True}))

    def stream():
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        streamed.append(live.client.post("/v1/completions", json=body).text)

    threads = [threading.Thread(target=ask), threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    wait_for(lambda: live.engine.running == 2 and live.engine.steps > 20)
    live.call(live.engine.die)
    for thread in threads:
        thread.join(10)
    assert_error(statuses[0], 503)
    assert '"error"' in streamed[0].split("\n\n")[-3] and "secret" not in streamed[0]
    assert live.client.get("/health").status_code == 503 and live.client.get("/health").json() == {"status": "dead"}
    assert live.client.get("/ready").status_code == 503
    for path, body in (("/v1/completions", ASKED), ("/v1/embeddings", {"input": "x"}), ("/tokenize", {"prompt": "x"})):
        actual = live.client.post(path, json=body)
        assert_error(actual, 503)
        assert actual.headers["retry-after"]
    assert live.engine.admitted == 0


def test_unexpected_errors_are_a_500_without_the_message(make_server, caplog):
    live = make_server()

    def submit(request):
        raise ZeroDivisionError("/secret/path")

    live.engine.submit = submit
    actual = live.client.post("/v1/completions", json=ASKED)
    assert_error(actual, 500)
    assert "secret" not in actual.text and "ZeroDivision" not in actual.text
    assert "/secret/path" in caplog.text  # only in the log
    assert live.engine.admitted == 0


def test_the_same_request_many_times_at_once(live):
    """Clients do not choose ids, so requests cannot be confused."""
    with ThreadPoolExecutor(16) as pool:
        bodies = [{"prompt": f"question {i % 4}", "max_tokens": 30} for i in range(32)]
        headers = {"x-request-id": "the same"}
        answers = list(pool.map(lambda body: live.client.post("/v1/completions", json=body, headers=headers).json(), bodies))
    assert len({answer["id"] for answer in answers}) == 32
    assert len({answer["choices"][0]["text"] for answer in answers}) == 4
    assert all(answers[i]["choices"] == answers[i % 4]["choices"] for i in range(32))


def test_prompts_at_the_context_limit(make_server):
    live = make_server(context=100)
    body = {"max_tokens": 1}
    assert live.client.post("/v1/completions", json={"prompt": [1] * 99, **body}).status_code == 200
    for length in (100, 101, 10_000):
        assert_error(live.client.post("/v1/completions", json={"prompt": [1] * length, **body}), 400, "prompt")
    assert_error(live.client.post("/v1/completions", json={"prompt": "x" * 10_000, **body}), 400, "prompt")
