"""`dso doctor`: text, JSON and exit codes."""

from __future__ import annotations

import json


def test_machine(dso):
    result = dso("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["model"] is None and report["errors"] == 0 and result.exit_code == 0
    assert {"check", "severity", "what", "cause", "fix", "facts"} == set(report["findings"][0])
    assert "native build" in dso("doctor").stdout


def test_model(dso, tiny_model):
    result = dso("doctor", tiny_model, "--json")
    assert result.exit_code == 0, result.output
    assert {"checkpoint", "tokenizer", "memory"} <= {f["check"] for f in json.loads(result.stdout)["findings"]}


def test_an_error_is_exit_code_1(dso, tmp_path):
    result = dso("doctor", tmp_path / "nowhere", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["errors"] == 1
    text = dso("doctor", tmp_path / "nowhere")
    assert text.exit_code == 1 and "ERROR" in text.stdout and "because:" in text.stdout


def test_an_impossible_context(dso, tiny_model):
    result = dso("doctor", tiny_model, "--context", "100000")
    assert result.exit_code == 1 and "--context-extension yarn" in " ".join(result.stdout.split())
    more = ("--context-extension", "yarn", "--context-length", "100000")
    assert dso("doctor", tiny_model, "--context", "100000", *more).exit_code == 0


def test_symptom(dso, tiny_model):
    result = dso("doctor", tiny_model, "--symptom", "repetition", "--json")
    assert json.loads(result.stdout)["symptom"] == "repetition"
    assert any(f["check"] == "repetition" for f in json.loads(result.stdout)["findings"])


def test_wrong_arguments_are_one_line_and_exit_code_2(dso_process):
    for arguments in (["--symptom", "latency-jitter"], ["--symptom", "slow"], ["--precision", "int5"]):
        done = dso_process("doctor", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("dso: ") and done.stderr.count("\n") == 1, done.stderr
