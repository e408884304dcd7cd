"""Commands in a locale without an encoding, with Python's UTF-8 mode off: Chinese is read and written, or escaped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

POSIX = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0"}
PRINT = "from deepseek_optimizer_cli.streams import tolerate_locale as t; t(); import sys; print(sys.argv[1]); print({!a})"


def start(*arguments, input="", environment=POSIX):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, input=input.encode(), capture_output=True, env=environment, timeout=240)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def test_arguments_and_output_are_utf8():
    done = start("-c", PRINT.format("世界 \ud800"), "你好")
    assert done.stdout.decode() == "你好\n世界 \\ud800\n"


def test_characters_that_the_terminal_lacks_are_escaped():
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = start("-c", PRINT.format("café 世界"), "x", environment=latin)
    assert done.stdout == "x\ncafé \\u4e16\\u754c\n".encode("latin-1")


def test_child_processes_use_utf8_mode():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(sys.flags.utf8_mode)'])"
    done = start("-c", f"from deepseek_optimizer_cli.streams import tolerate_locale as t; t(); {child}")
    assert done.stdout == b"1\n"


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """A folder with a model, chats and a document that have Chinese names and texts."""
    shutil.copytree(tiny_model, tmp_path / "模型")
    chat = {"messages": [{"role": "user", "content": "你好世界"}, {"role": "assistant", "content": "世界你好"}]}
    (tmp_path / "数据.jsonl").write_text(f"{json.dumps(chat, ensure_ascii=False)}\n" * 4, encoding="utf-8")
    (tmp_path / "文件.md").write_text("# 标题\n\n这是一个文件。\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


DSO = ("-m", "deepseek_optimizer")
COMMANDS = {
    "run": ("run", "模型", "你好", "-n", "8", "--system", "系统"),
    "info": ("info", "模型"),
    "doctor": ("doctor", "模型"),
    "longdoc": ("longdoc", "模型", "文件.md", "--ask", "这是什么", "-n", "8", "--max-length", "60", "--stride", "0"),
    "convert": ("convert", "模型", "输出", "-p", "int8"),
    "train": ("train", "--model", "模型", "--data", "数据.jsonl", "--output", "训练", "--steps", "1", "--batch-size", "1"),
}


@pytest.mark.slow
def test_a_chat_from_standard_input(folder):
    done = start(*DSO, "chat", "模型", "-n", "8", input="你好\n/system 系统\n世界\n/save 对话.json\n")
    assert done.returncode == 0, done.stderr.decode()
    saved = json.loads((folder / "对话.json").read_text(encoding="utf-8"))
    assert "世界" in json.dumps(saved, ensure_ascii=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(folder, name):
    done = start(*DSO, *COMMANDS[name])
    assert done.returncode == 0, done.stderr.decode()
    made = {"convert": "输出/config.json", "train": "训练/loss.json"}.get(name)
    assert made is None or (folder / made).is_file()
