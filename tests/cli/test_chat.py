"""`dso chat`: a scripted conversation, its commands, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from deepseek_optimizer.chat import stream
from support.fake_chat_server import FakeChatServer, Reply, error_body


def _talk(dso, model, *lines, options=()):
    return dso("chat", model, "-t", "0", "-n", "4", *options, input="".join(line + "\n" for line in lines))


def test_history_commands_and_saving(dso, tiny_model, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["/system Be brief.", "One", "Two \\", "lines", "/stats", f"/save {saved}", "/exit", "never read"]
    result = _talk(dso, tiny_model, *lines)
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [(m["role"], m["content"]) for m in messages if m["role"] != "assistant"] == [
        ("system", "Be brief."), ("user", "One"), ("user", "Two \nlines"),
    ]  # fmt: skip
    assert result.stdout == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    assert "tokens" in result.stderr  # /stats


def test_reset_undo_and_system(dso, tiny_model, tmp_path):
    saved = tmp_path / "talk.json"
    result = _talk(
        dso, tiny_model, "One", "/reset", "Two", "Three", "/undo", "/system", f"/save {saved}"
    )  # the end of the input ends the conversation
    assert result.exit_code == 0 and "(no system prompt)" in result.stderr
    assert [m["content"] for m in json.loads(saved.read_text(encoding="utf-8")) if m["role"] == "user"] == ["Two"]


def test_mistakes_do_not_end_the_conversation(dso, tiny_model, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["/nonsense", "/save", f"/save {tmp_path}/no/such/folder", "x" * 300, "", "Two", f"/save {saved}"]
    result = _talk(dso, tiny_model, *lines)
    assert result.exit_code == 0
    assert "/nonsense" in result.stderr and "no room" in result.stderr and "No such file" in result.stderr
    assert [m["content"] for m in json.loads(saved.read_text(encoding="utf-8")) if m["role"] == "user"] == ["Two"]


def test_interrupt_stops_only_the_answer(dso, endless_model, tmp_path, monkeypatch):
    saved, pieces = tmp_path / "talk.json", []

    def write(text):
        pieces.append(text)
        if len(pieces) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stream, "write_now", write)
    lines = ["One", "Two", f"/save {saved}"]
    result = dso("chat", endless_model, "-t", "2", "--seed", "1", "-n", "20", input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    messages = json.loads(saved.read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"].startswith(pieces[0])


def test_a_model_without_a_template_is_an_error(dso, tiny_model, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    result = _talk(dso, bare, "Hello")
    assert result.exit_code == 2 and "no chat template" in result.stderr


def test_a_server(dso, tmp_path, monkeypatch):
    saved = tmp_path / "talk.json"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeChatServer() as server:
        server.api_key = "secret"
        server.replies = [
            Reply(["Bon", "jour"]),
            Reply(status=429, error=error_body("full"), headers={"Retry-After": "3"}),
            Reply(["Encore"], finish="length"),
        ]
        lines = ["/system Be brief.", "One", "/stats", "Two", "Three", "/undo", f"/save {saved}"]
        options = ["--url", server.url, "--api-key", "secret", "-t", "0", "-n", "4", "--seed", "1"]
        result = dso("chat", *options, input="\n".join(lines) + "\n")
        bodies = server.bodies
    assert result.exit_code == 0 and result.stdout == "Bonjour\nEncore\n", result.output
    assert "10 tokens" in result.stderr and "dso: the server is busy: full; try again in 3 s" in result.stderr
    assert [m["content"] for m in json.loads(saved.read_text())] == ["Be brief.", "One", "Bonjour"]
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"], bodies[0]["seed"]) == (0, 4, 1)
    assert [m["content"] for m in bodies[2]["messages"]] == ["Be brief.", "One", "Bonjour", "Three"]


def test_ctrl_c_with_a_server_ends_only_the_answer(dso, monkeypatch):
    pieces = []

    def write(text):
        pieces.append(text)
        if text == "A":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stream, "write_now", write)
    with FakeChatServer() as server:
        server.replies = [Reply(["A", threading.Event(), "B"])]
        result = dso("chat", "--url", server.url, input="One\n/stats\nTwo\n")
        assert server.cut.wait(10)
        assert [m["content"] for m in server.bodies[1]["messages"]] == ["One", "A", "Two"]
    assert result.exit_code == 0 and "".join(pieces) == "A\nYou said: Two\n"
    assert "reported no token counts" in result.stderr


def test_a_server_whose_key_is_in_the_environment(dso, monkeypatch):
    with FakeChatServer() as server:
        server.api_key = "secret"
        assert "rejects the API key" in dso("chat", "--url", server.url, "--api-key", "wrong").stderr
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert dso("chat", "--url", server.url, "--model", "other", input="Hi\n").stdout == "You said: Hi\n"
        assert server.bodies[0]["model"] == "other" and "temperature" not in server.bodies[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a MODEL to load"),
        (["some/model", "--url", "http://localhost:1"], "or the --url of a server"),
        (["--url", "localhost:8000"], "--url must be a URL such as http://localhost:8000"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--url", "http://127.0.0.1:1", "--kv-cache", "int8"], "--kv-cache applies only to a model loaded by this command"),
        (
            ["--url", "http://127.0.0.1:1", "--context-length", "9"],
            "--context-length applies only to a model loaded by this command",
        ),
        (
            ["--url", "http://127.0.0.1:1", "--attention", "sparse"],
            "--attention applies only to a model loaded by this command",
        ),
        (["--url", "http://127.0.0.1:1", "--draft-precision", "int4"], "--draft-precision applies only to a model loaded"),
        (["--url", "http://127.0.0.1:1", "--draft-model", "small"], "--draft-model applies only to a model loaded"),
        (["some/model", "--model", "name"], "--model is the name of a model on a server"),
        (["some/model", "--top-p", "0"], "top_p"),
    ],
)
def test_bad_arguments_are_one_line(dso, arguments, message):
    result = dso("chat", *arguments, input="Hi\n")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("dso: ") and message in result.stderr
