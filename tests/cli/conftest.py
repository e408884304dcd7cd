"""Runs the command line: in this process for most tests, in a separate one where pipes and exit codes matter."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from deepseek_optimizer_cli.app import app
from support import warm_python


@pytest.fixture
def dso():
    """dso("run", model, "prompt", input=None) -> typer's result: exit_code, stdout, stderr."""

    def invoke(*arguments, input=None):
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return invoke


@pytest.fixture
def dso_process():
    """The same in a process whose three streams are pipes."""

    def start(*arguments, input=""):
        return warm_python.run(warm_python.DSO, *arguments, input=input)

    return start


@pytest.fixture
def endless_model(tiny_model, tmp_path):
    """The tiny model without an end-of-sequence token, which a random model might generate first."""
    folder = shutil.copytree(tiny_model, tmp_path / "endless")
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return folder
