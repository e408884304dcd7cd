"""`dso cost`: end to end on a tiny model, and its errors."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.backends import cpu
from deepseek_optimizer.bench.scaling import Costs

SMALL = ("--prompt", "8", "--new", "4", "--batch", "2", "--repeats", "1", "--threads", "1")


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="needs the native backend")
def test_this_machine_and_predictions(dso, tiny_model, tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(Costs({1: 20.0}, 0.5, {1: 1e-6}, 1e-4, 40.0).to_dict()))
    options = (
        *SMALL, "--price-per-hour", "0.5", "--costs", file, "--instances", "c7a.8xlarge,c8g.8xlarge", "--price",
        "c8g.8xlarge=1", "--hosted", "they=0.1,0.4",
    )  # fmt: skip
    result = dso("cost", tiny_model, *options, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    here, amd, arm = report["machines"]
    assert (here["how"], amd["how"], arm["per_hour"]) == ("measured", "predicted", 1.0)
    assert here["out"][0] == pytest.approx(0.5 / 3600 / report["this_machine"]["answer"] * 1e6)
    result = dso("cost", tiny_model, *options)
    assert "(hosted)" in result.stdout and "Cost of a million tokens" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--instances", "c9.huge"), "there is no 'c9.huge'; known: c7i.8xlarge"),
        (("--instances", "none"), "nothing to compute"),
        (("--price", "c7i.8xlarge"), "--price must be NAME=PRICE with prices above zero"),
        (("--price", "c9.huge=1"), "there is no instance 'c9.huge'"),
        (("--hosted", "them=0.1"), "--hosted must be NAME=IN,OUT"),
        (("--hosted", "them=0.1,nan"), "--hosted must be NAME=IN,OUT"),
    ],
)
def test_errors_before_loading(dso, options, message):
    result = dso("cost", "no-model", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_damaged_file_of_costs(dso, tmp_path):
    file = tmp_path / "costs.json"
    for text in ("{}", "[]", "not JSON"):
        file.write_text(text)
        result = dso("cost", "no-model", "--costs", file)
        assert result.exit_code == 2 and "costs.json: not what" in result.stderr


def test_a_model_whose_steps_are_not_known(dso, tiny_model, monkeypatch):
    """One line, before anything is measured."""
    monkeypatch.setattr("deepseek_optimizer.bench.measure.measure", None)
    monkeypatch.setattr("deepseek_optimizer.bench.step_work._products", lambda runtime: [])
    result = dso("cost", tiny_model, *SMALL)
    assert result.exit_code != 0 and "need a model with an execution plan" in result.stderr and "Traceback" not in result.stderr
