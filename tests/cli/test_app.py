"""Help, versions, and how commands fail."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from deepseek_optimizer_cli import info
from deepseek_optimizer_cli.app import app

COMMANDS = ("run", "chat", "longdoc", "serve", "train", "convert", "info", "doctor", "demo", "bench")


def test_help_lists_the_commands_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom deepseek_optimizer_cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in COMMANDS) and "..." not in done.stdout.split("Commands:")[1]


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_never_truncates_option_names(name, width):
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=width)
    assert result.exit_code == 0 and "Usage" in result.stdout and "…" not in result.stdout
    words = set(re.split(r"[\s,/]+", result.stdout))
    for option in get_command(app).commands[name].params:
        assert set(option.opts + option.secondary_opts) <= words | {option.name}, option.opts
        assert option.help, option.opts
    assert max(map(len, result.stdout.splitlines())) <= width


def test_help_has_a_section_per_group_of_options(dso):
    lines = dso("serve", "--help").stdout.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Arguments:" and {"Network and access:", "Model:", "Uploaded files:", "Options:"} <= set(titles)
    place = {title: lines.index(title) for title in titles}
    flag = next(i for i, line in enumerate(lines) if line.strip().startswith("--max-file-mb"))
    assert max(title for title in place.values() if title < flag) == place["Uploaded files:"]


@pytest.mark.parametrize("name, arguments", [("run", "MODEL PROMPT"), ("chat", "[MODEL]"), ("longdoc", "MODEL FILE...")])
def test_the_usage_line_shows_which_arguments_are_optional_or_repeatable(dso, name, arguments):
    usage, *lines = dso(name, "--help").stdout.splitlines()
    assert usage.endswith(f" {name} [OPTIONS] {arguments}")
    assert not any(kind in line for line in lines for kind in ("<str>", "<list"))  # Typer's own layout names Python types


def test_a_missing_model_is_one_line_and_exit_code_2(dso_process, tmp_path):
    done = dso_process("run", tmp_path / "nowhere", "Hello")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dso: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_a_wrong_config_is_not_blamed_on_the_tokenizer(dso, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
    (folder / "tokenizer_config.json").unlink(missing_ok=True)  # Transformers then reads the tokenizer's class from the config
    for command in (["run", folder, "Hello"], ["info", folder], ["convert", folder, tmp_path / "out"]):
        result = dso(*command)
        assert result.exit_code == 2 and "config.hidden_size" in result.stderr and "tokenizer" not in result.stderr


def test_the_version_of_a_source_tree(dso, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = dso("--version")
    assert result.exit_code == 0 and result.stdout == "deepseek-optimizer, not installed\n"


def test_debug_shows_the_traceback(dso, tmp_path):
    result = dso("--debug", "run", tmp_path / "nowhere", "Hello")
    assert isinstance(result.exception, (ValueError, OSError)) and not isinstance(result.exception, SystemExit)


def test_bugs_show_a_traceback(dso, monkeypatch):
    monkeypatch.setattr(info, "machine_facts", lambda: {}["bug"])
    assert isinstance(dso("info").exception, KeyError)
