"""`dso chat`: a scripted conversation, its commands, and Ctrl-C."""

from __future__ import annotations

import json
import signal

from deepseek_optimizer.chat import stream


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
    )  # end of input ends it
    assert result.exit_code == 0 and "(no system prompt)" in result.stderr
    assert [m["content"] for m in json.loads(saved.read_text(encoding="utf-8")) if m["role"] == "user"] == ["Two"]


def test_mistakes_do_not_end_the_conversation(dso, tiny_model, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["/nonsense", "/save", f"/save {tmp_path}/no/such/folder", "x" * 300, "", "Two", f"/save {saved}"]
    result = _talk(dso, tiny_model, *lines)
    assert result.exit_code == 0
    assert "/nonsense" in result.stderr and "no room" in result.stderr and "No such file" in result.stderr
    assert [m["content"] for m in json.loads(saved.read_text(encoding="utf-8")) if m["role"] == "user"] == ["Two"]


def test_interrupt_stops_the_answer_and_not_the_conversation(dso, endless_model, tmp_path, monkeypatch):
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


def test_a_model_without_a_template_is_refused(dso, tiny_model, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    result = _talk(dso, bare, "Hello")
    assert result.exit_code == 2 and "no chat template" in result.stderr
