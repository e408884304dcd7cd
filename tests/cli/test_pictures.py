"""Pictures on the command line: `dso run --image`, and /image in `dso chat`."""

from __future__ import annotations

import json

import pytest

from support.picture_processors import picture, save_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    save_pair(folder)
    picture(33, 21).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    return folder


def test_run(dso, folder):
    one = dso("run", folder, "what", "--image", folder / "a.png", "-t", "0", "-n", "4", "--json")
    assert one.exit_code == 0, one.stderr
    two = dso("run", folder, "what", "--image", folder / "a.png", "--image", folder / "a.png", "-t", "0", "-n", "4", "--json")
    tokens = [json.loads(result.stdout)["prompt_tokens"] for result in (one, two)]
    assert tokens[1] - tokens[0] == 9 + 2 + 4  # the picture's, around it, and line breaks
    text = dso("run", folder, "what", "-t", "0", "-n", "4", "--json")
    assert json.loads(text.stdout)["prompt_tokens"] == tokens[0] - (tokens[1] - tokens[0])


def test_run_errors(dso, folder, tiny_model):
    for arguments, message in (
        ((folder, "what", "--image", folder / "b.png"), "is not a picture in a supported format"),
        ((folder, "what", "--image", folder / "missing.png"), "cannot be read"),
        ((folder, "what", "--raw", "--image", folder / "a.png"), "needs the chat template"),
        ((tiny_model, "what", "--image", folder / "a.png"), "this model reads text only"),
    ):
        result = dso("run", *arguments)
        assert result.exit_code != 0 and message in result.stderr and "Traceback" not in result.stderr


def test_chat(dso, folder):
    lines = [f"/image {folder / 'a.png'}", "what", "/stats", f"/image {folder / 'b.png'}", "and now", "/exit"]
    result = dso("chat", folder, "-t", "0", "-n", "3", input="\n".join(lines) + "\n")
    assert result.exit_code == 0
    assert "is not a picture in a supported format" in result.stderr
    assert "prompt 22 tokens" in result.stderr
