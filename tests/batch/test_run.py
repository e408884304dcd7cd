"""Batch jobs end to end: answers equal those of the server, and do not depend on interruptions."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import time

import httpx
import pytest
from typer.testing import CliRunner

from deepseek_optimizer.batch.places import Places
from deepseek_optimizer.batch.requests import read_requests
from deepseek_optimizer.batch.results import files_digest
from deepseek_optimizer.batch.run import answer
from deepseek_optimizer.errors import EngineDeadError
from deepseek_optimizer.profiles import Profile, machine_identity, model_identity, save
from deepseek_optimizer_cli.app import app
from support.saved_llama import saved_llama
from support.warm_python import DSO, WarmPython


def requests(count):
    """Chats, completions and responses, greedy and sampled, some with several answers, one of an error."""
    rng = random.Random(count)
    function = {"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}}
    for n in range(count):
        body = {"max_tokens": rng.randint(1, 12), "temperature": rng.choice([0, 0.7, 1.5]), "n": 1 + (n % 5 == 4)}
        text = "".join(rng.choices("abc ", k=rng.randint(1, 60)))
        if n % 3 == 1:
            yield {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": text}}
        else:
            messages = [{"role": "user", "content": "The same beginning for all. " + text}]
            yield {
                "custom_id": f"r{n}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**body, "messages": messages},
            }
    for n in range(4):
        body = {"input": f"Text {n}", "max_output_tokens": 24, "temperature": rng.choice([0, 1.5])}
        if n == 0:
            body |= {"tools": [function], "tool_choice": "required", "max_output_tokens": 128, "store": False}
        yield {"custom_id": f"s{n}", "method": "POST", "url": "/v1/responses", "body": body}
    yield {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": -1}}


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in requests(30)))
    return path


def command(model, source, output):
    return ["batch", str(model), str(source), str(output), "--max-running", "4", "--precision", "fp32"]


@pytest.fixture(scope="module")
def model(byte_tokenizer, tmp_path_factory):
    """The tiny model, with a context in which tools can be described."""
    return saved_llama(tmp_path_factory.mktemp("batch-model") / "model", byte_tokenizer, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def whole(model, job_file):
    """The output of a job that nothing interrupted."""
    output = job_file.with_name("whole.jsonl")
    result = CliRunner().invoke(app, command(model, job_file, output))
    assert result.exit_code == 1, result.stderr  # one request is wrong
    assert "dso: 1 of 35 requests ended in an error" in result.stderr
    return output.read_bytes()


def test_answers(whole, job_file):
    lines, given = [json.loads(line) for line in whole.splitlines()], list(requests(30))
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in given]
    for line, request in zip(lines[:-1], given, strict=False):
        body = line["response"]["body"]
        assert line["response"]["status_code"] == 200 and line["error"] is None, line
        if request["url"] == "/v1/responses":
            assert body["object"] == "response" and body["store"] is False and body["status"] in ("completed", "incomplete")
            assert body["created_at"] == int(job_file.stat().st_mtime)
            assert 0 < body["usage"]["output_tokens"] <= request["body"]["max_output_tokens"]
            assert [item["type"] for item in body["output"]] == ["function_call" if request["custom_id"] == "s0" else "message"]
            continue
        assert len(body["choices"]) == request["body"]["n"]
        assert 0 < body["usage"]["completion_tokens"] <= request["body"]["n"] * request["body"]["max_tokens"]
        assert body["created"] == int(job_file.stat().st_mtime)
    assert lines[-1]["response"]["status_code"] == 400
    assert lines[-1]["response"]["body"]["error"]["param"] == "temperature"
    ids = [line["id"] for line in lines] + [line["response"]["body"].get("id") for line in lines]
    assert len(set(ids)) == len(ids)


def test_sampled_answers_differ(whole):
    """Requests without a seed do not all get the same one."""
    sampled = [
        json.loads(line)["response"]["body"]["choices"][0]["text"]
        for line, request in zip(whole.splitlines(), requests(30), strict=False)
        if request["url"] == "/v1/completions" and request["body"].get("temperature", 0) > 1
    ]
    assert len(set(sampled)) > 1


@pytest.mark.wide
def test_stopped_by_ctrl_c_and_kill(whole, model, job_file, tmp_path):
    """Killed at arbitrary moments until it is done: the same bytes."""
    output, rng = tmp_path / "out.jsonl", random.Random(3)
    partial, kills = tmp_path / "out.jsonl.partial", 0
    while not output.exists():
        process = WarmPython(DSO, *command(model, job_file, output))
        before = len(partial.read_bytes().splitlines()) if partial.exists() else 1
        more = rng.randint(1, 12)
        while process.poll() is None:
            if kills < 4 and partial.exists() and len(partial.read_bytes().splitlines()) >= before + more:
                kills += 1
                process.send_signal(signal.SIGINT if kills == 2 else signal.SIGKILL)
                break
            time.sleep(0.005)
        process.communicate(timeout=60)
    assert kills >= 2
    assert output.read_bytes() == whole
    assert not partial.exists()


def test_what_differs_from_run_to_run_is_replaced(job_file):
    """A server's answer with random ids, times and counts of cached tokens, twice; the first time it is busy."""
    job, calls = read_requests(job_file), []

    def respond(request):
        calls.append(json.loads(request.content))
        if len(calls) == 1:
            return httpx.Response(429, json={"error": {}})
        moment = len(calls)
        message = {"role": "assistant", "tool_calls": [{"id": f"call_{moment}", "function": {}}, {"id": f"call_{moment}b"}]}
        usage = {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": moment}}
        body = {"id": f"chatcmpl-{moment}", "created": moment, "choices": [{"index": 0, "message": message}], "usage": usage}
        body["timings"] = {"prompt_ms": moment}
        return httpx.Response(200, json=body)

    async def twice():
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://localhost") as client:
            return [await answer(client, job, job.requests[0], 7, Places(1)) for _ in range(2)]

    first, second = asyncio.run(twice())
    assert first == second and len(calls) == 3 and first["response"]["body"]["created"] == 7
    ids = [call["id"] for call in first["response"]["body"]["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 2 and all(id.startswith("call_") for id in ids)
    assert first["response"]["body"]["usage"] == {"prompt_tokens": 5}
    assert 0 <= calls[0]["seed"] == calls[1]["seed"] == calls[2]["seed"]


def test_what_differs_in_responses_is_replaced(tmp_path):
    """Ids of the response, of its items and calls, its time and the counts of the cache; nothing is stored."""
    line = {"custom_id": "a", "url": "/v1/responses", "body": {"input": "Hi"}}
    (tmp_path / "in").write_text("".join(json.dumps({**line, "custom_id": name}) + "\n" for name in "ab"))
    job, calls = read_requests(tmp_path / "in"), []

    def respond(request):
        calls.append(json.loads(request.content))
        moment = len(calls)
        output = [
            {"id": f"rs_{moment}", "type": "reasoning"},
            {"id": f"fc_{moment}", "type": "function_call", "call_id": f"call_{moment}"},
            {"id": f"fc_{moment}b", "type": "function_call", "call_id": f"call_{moment}b"},
            {"id": f"msg_{moment}", "type": "message"},
        ]
        usage = {"input_tokens": 5, "input_tokens_details": {"cached_tokens": moment, "cache_write_tokens": 0}}
        body = {
            "id": f"resp_{moment}",
            "created_at": moment,
            "output": output,
            "usage": usage,
            "timings": {"prompt_ms": moment},
        }
        return httpx.Response(200, json=body)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://localhost") as client:
            return [await answer(client, job, job.requests[n], 7, Places(1)) for n in (0, 0, 1)]

    first, second, other = asyncio.run(ask())
    assert first == second and all(call["store"] is False and call["seed"] >= 0 for call in calls)
    body = first["response"]["body"]
    assert body["created_at"] == 7 and body["usage"] == {"input_tokens": 5} and "timings" not in body
    ids = [
        one[key]
        for line in (body, other["response"]["body"])
        for one in (line, *line["output"])
        for key in ("id", "call_id")
        if key in one
    ]
    kinds = ["resp", "rs", "fc", "call", "fc", "call", "msg"]
    assert [id.partition("_")[0] for id in ids] == kinds * 2 and len(set(ids)) == len(ids)


@pytest.mark.parametrize("code", ["engine_dead", "model_file_changed", "rank_lost", "worker_lost"])
def test_a_server_that_stays_unavailable(job_file, monkeypatch, code):
    """A dead engine ends the job, without a result; a request that kills a worker each time has an error as its result."""
    job, calls = read_requests(job_file), []

    def respond(request):
        calls.append(request)
        return httpx.Response(503, json={"error": {"code": code, "message": "what is wrong"}})

    async def no_sleep(seconds):
        assert 0 < seconds <= 60

    async def ask():
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://localhost") as client:
            monkeypatch.setattr(asyncio, "sleep", no_sleep)
            return await answer(client, job, job.requests[0], 7, Places(1))

    if code == "worker_lost":
        assert asyncio.run(ask())["response"]["status_code"] == 503 and len(calls) == 10
    else:
        with pytest.raises(EngineDeadError, match="what is wrong; start the same command again"):
            asyncio.run(ask())


def test_more_answers_than_places_in_the_batch(tiny_model, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    body = {"prompt": "a", "n": 32, "max_tokens": 1}
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}))
    arguments = ["batch", str(tiny_model), str(source), str(output), "--max-running", "1", "--precision", "fp32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(json.loads(output.read_text())["response"]["body"]["choices"]) == 32


def test_a_job_with_another_model_is_not_continued(tiny_model, job_file, tmp_path):
    """The model in the same directory was replaced, or another one drafts."""
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    partial = tmp_path / "out.partial"
    partial.write_text(json.dumps({"job": {}, "written": 0}) + "\n")
    messages = []
    for change in ((), ("--draft-precision", "int4")):
        result = CliRunner().invoke(app, [*command(model, job_file, output), *change])
        assert result.exit_code == 2
        messages.append(result.stderr)
    assert all("a job with another input and model and model files and options was stopped here" in one for one in messages)
    digest = files_digest(model)
    os.utime(model / "config.json", (1, 1))
    assert files_digest(model) != digest == files_digest(tiny_model)


def test_a_job_with_another_profile_is_not_continued(tiny_model, job_file, tmp_path, monkeypatch):
    """What a profile sets may change answers, so that it is part of the job, whatever its file is called."""
    identity = machine_identity(), model_identity(tiny_model)
    path, output = tmp_path / "p.json", tmp_path / "out"

    async def stop(*_):
        raise RuntimeError

    monkeypatch.setattr("deepseek_optimizer.batch.run.run_batch", stop)
    results = []
    for chunk in (64, 64, 128):
        profile = Profile(*identity, "latency", "chat", {"prefill_chunk": chunk}, options={"precision": "fp32"})
        save(profile, path)
        results.append(CliRunner().invoke(app, [*command(tiny_model, job_file, output), "--profile", str(path)]))
    assert [type(result.exception) for result in results[:2]] == [RuntimeError, RuntimeError]
    assert "dso: profile: prefill_chunk=64" in results[0].stderr
    assert results[2].exit_code == 2 and "a job with another options was stopped here" in results[2].stderr


@pytest.mark.parametrize("given", [(), ("--max-running", "5")])
def test_a_profile_sets_the_batch_and_drafts(tiny_model, job_file, tmp_path, monkeypatch, given):
    """What the command line does not set is what the profile says, not a default."""
    identity, seen = (machine_identity(), model_identity(tiny_model)), []

    def stop(served, settings):
        seen.append(served)
        raise RuntimeError

    monkeypatch.setattr("deepseek_optimizer_cli.serve_engine.load_engine", stop)
    save(Profile(*identity, "latency", "chat", {"batch_size_range": (1, 3)}, drafts=2), path := tmp_path / "p.json")
    CliRunner().invoke(app, ["batch", str(tiny_model), str(job_file), str(tmp_path / "out"), "--profile", str(path), *given])
    (served,) = seen
    assert served.config["batch_size_range"] == (1, 5 if given else 3) and served.engine["drafts"] == 2


def test_a_seed_is_kept(job_file):
    job, seen = read_requests(job_file), []

    def respond(request):
        seen.append(json.loads(request.content).get("seed"))
        return httpx.Response(200, json={})

    async def ask():
        async with httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://localhost") as client:
            for request in job.requests[:2]:
                await answer(
                    client, job, type(request)(request.index, "x", request.url, {**request.body, "seed": 5}), 7, Places(1)
                )
            await answer(client, job, type(request)(0, "x", "/v1/embeddings", {"input": "a"}), 7, Places(1))

    asyncio.run(ask())
    assert seen == [5, 5, None]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tool-format", "nothing"), "--tool-format must be one of"),
        (("--generation-config", "auto"), "--generation-config must be one of"),
        (("--served-model-name", " "), "--served-model-name must not be empty"),
    ],
)
def test_wrong_options_are_errors_before_loading(tmp_path, job_file, option, message):
    result = CliRunner().invoke(app, [*command("no-model", job_file, tmp_path / "new"), *option])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_errors_before_loading(tmp_path, job_file):
    (tmp_path / "out").write_text("mine")
    for source, output, message in (
        (tmp_path / "nowhere", tmp_path / "new", "nowhere"),
        (tmp_path / "out", tmp_path / "new", "line 1: not valid JSON"),
        (job_file, tmp_path / "out", "the file exists"),
    ):
        result = CliRunner().invoke(app, command("no-model", source, output))
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
