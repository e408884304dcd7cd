"""The input of a batch job is checked as a whole before a model is loaded."""

from __future__ import annotations

import hashlib
import json

import pytest

from deepseek_optimizer.batch.requests import read_requests
from deepseek_optimizer.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}


def write(path, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode())
    return path


def test_requests_in_order(tmp_path):
    path = write(tmp_path / "in", LINE, "", "  ", {**LINE, "custom_id": "é", "url": "/v1/embeddings", "body": {"input": "x"}})
    job = read_requests(path)
    assert [(r.index, r.custom_id, r.url) for r in job.requests] == [
        (0, "a", "/v1/chat/completions"),
        (1, "é", "/v1/embeddings"),
    ]
    assert job.requests[0].body == CHAT
    assert job.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert job.written == int(path.stat().st_mtime)


def test_a_quality_is_allowed_but_not_one_that_depends_on_the_load(tmp_path):
    body = {**CHAT, "quality": "fast", "min_quality": None}
    assert read_requests(write(tmp_path / "in", {**LINE, "body": body})).requests[0].body == body


def test_a_response_is_not_stored(tmp_path):
    body = {"input": "Hi", "store": False, "background": None, "previous_response_id": None, "stream": False}
    lines = [{**LINE, "custom_id": f"r{n}", "url": "/v1/responses", "body": b} for n, b in enumerate([body, {"input": "Hi"}])]
    assert [r.body for r in read_requests(write(tmp_path / "in", *lines)).requests] == [body, {"input": "Hi"}]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("store", True, "responses of a batch are in its output and are not stored; set it to false"),
        ("background", True, "a batch waits for its responses; leave it out"),
        ("previous_response_id", "resp_1", "a batch must not depend on what is stored; send the whole conversation"),
        ("stream", True, "answers of a batch are written as a whole"),
        ("min_quality", "fast", "answers of a batch must not depend on the load"),
    ],
)
def test_fields_of_stored_responses_are_refused(tmp_path, field, value, message):
    line = {**LINE, "custom_id": "b", "url": "/v1/responses", "body": {"input": "Hi", field: value}}
    with pytest.raises(DataError) as error:
        read_requests(write(tmp_path / "in", LINE, line))
    assert (error.value.line, error.value.field) == (2, f"body.{field}") and message in str(error.value)


def test_windows_line_ends(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"".join(json.dumps({**LINE, "custom_id": n}).encode() + b"\r\n" for n in "ab"))
    assert [r.custom_id for r in read_requests(path).requests] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"custom_id": "b", "body": {"temperature": NaN}}', "line 2: not valid JSON"),
        ('{"custom_id": "\\ud800"}', "line 2: not valid JSON"),
        ("[]", "line 2: must be a JSON object with custom_id"),
        ({**LINE, "custom_id": "b", "Url": "x"}, "line 2, Url: the field is not known; the fields are body, custom_id"),
        ({**LINE, "custom_id": 7}, "line 2, custom_id: must be a text of 1 to 512 characters, got 7"),
        ({**LINE, "custom_id": ""}, "line 2, custom_id"),
        (LINE, "line 2, custom_id: 'a' is the name of line 1 too"),
        ({**LINE, "custom_id": "b", "method": "GET"}, "line 2, method: must be POST, got 'GET'"),
        ({**LINE, "custom_id": "b", "url": "/v1/models"}, "line 2, url: must be one of /v1/chat/completions"),
        ({**LINE, "custom_id": "b", "url": ["/v1/embeddings"]}, "line 2, url"),
        ({**LINE, "custom_id": "b", "body": "x"}, "line 2, body: must be the JSON object that /v1/chat/completions takes"),
        ({**LINE, "custom_id": "b", "body": {**CHAT, "stream": True}}, "line 2, body.stream"),
        (
            {**LINE, "custom_id": "b", "body": {**CHAT, "min_quality": "fast"}},
            "line 2, body.min_quality: answers of a batch must",
        ),
    ],
)
def test_errors_name_line_and_field(tmp_path, line, message):
    with pytest.raises(DataError) as error:
        read_requests(write(tmp_path / "in", LINE, line))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "in"))


def test_an_empty_file(tmp_path):
    with pytest.raises(DataError, match="there are no requests"):
        read_requests(write(tmp_path / "in", "", " "))
