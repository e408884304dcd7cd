"""`dso bench --long`: end to end on a tiny model, and its errors."""

from __future__ import annotations

import json

import pytest

from support.saved_llama import saved_llama


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory, byte_tokenizer):
    """A random model with a context of 4096 tokens."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    return saved_llama(folder, byte_tokenizer, max_position_embeddings=4096)


def test_modes_tables_page_and_json(dso_process, roomy_model, tmp_path):
    page = tmp_path / "r.html"
    result = dso_process(
        "bench", roomy_model, "--long", "--lengths", "2048,8192", "--modes", "flash,sparse", "--tasks", "single, common",
        "--samples", "1", "--attention-window", "256", "--threads", "1", "--precision", "fp32", "--html", page, "--json",
    )  # fmt: skip
    assert result.returncode == 0 and all(line.startswith("Processing long texts: ") for line in result.stderr.splitlines())
    report = json.loads(result.stdout.splitlines()[-1])
    assert [(row["mode"], row["length"]) for row in report["rows"]] == [
        (mode, length) for mode in ("flash", "sparse") for length in (2048, 8192)
    ]
    for row in report["rows"]:
        if row["length"] == 8192:
            assert "context of 4,096" in row["error"]
        else:
            assert row["error"] is None and set(row["accuracy"]) == {"single", "common"} and row["prefill_tok_s"] > 0
    assert report["config"] == {"precision": "fp32", "threads": 1, "attention_window": 256}
    assert "2,048 sparse" in result.stdout and page.read_text().count("<svg") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--long", "--prompt", "12"], "--prompt cannot be combined with --long"),
        (["--long", "--quality"], "--quality cannot be combined with --long"),
        (["--lengths", "4096"], "--lengths needs --long"),
        (["--long", "--lengths", "4096;1"], "commas"),
        (["--long", "--lengths", "512"], "1024 tokens or more"),
        (["--long", "--modes", "dense"], "flash, sliding, sparse"),
        (["--long", "--tasks", "needle"], "expected some of single"),
        (["--long", "--context-length", "16384"], "context_extension"),
    ],
)
def test_invalid_arguments(dso, roomy_model, options, message):
    result = dso("bench", roomy_model, *options)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.output
