"""Attention modes over long texts: what a side process prints, how it is evaluated, and sides that fail."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from deepseek_optimizer.bench.long.run import LongRequest, printed, rows_of, run
from deepseek_optimizer.bench.long.sample import score
from deepseek_optimizer.bench.sides import long as side
from deepseek_optimizer.errors import CacheFullError, CheckpointError, ConfigError
from deepseek_optimizer.integration.bind.runtime import OptimizerWarning
from support.saved_llama import saved_llama

LENGTHS = (1024, 2048)


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory, byte_tokenizer):
    """A random model with a context of 2048 tokens."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    return saved_llama(folder, byte_tokenizer, max_position_embeddings=2048)


def _arguments(model, **options):
    given = {"config": {}, "lengths": [2048], "tasks": ["single"], "samples": 1, "seed": 0, **options}
    return argparse.Namespace(model=str(model), **given)


def _measured(mode, **fields):
    """A line of a sample: the first token after 2 s, then two more every 0.1 s."""
    run = {"prompt": 2000, "batch": 1, "times": [2.0, 2.1, 2.2], "generated": 3}
    return {"length": 2048, "task": "single", "score": 1.0, "run": run, "answer": mode, **fields}


def test_a_side_measures_the_requested_cases(roomy_model):
    config = {"precision": "fp32", "threads": 1}
    lines = list(
        side.measure(_arguments(roomy_model, config=config, tasks=["single", "common"], samples=2, lengths=[2048, 4096]))
    )
    assert lines[0]["threads"] == 1 and lines[0]["load_s"] > 0
    assert [line["task"] for line in lines[1:5]] == ["single", "single", "common", "common"]
    for line in lines[1:5]:
        assert line["length"] == 2048 and 0 <= line["score"] <= 1 and len(line["run"]["times"]) == side.NEW
        assert 0.99 * (2048 - side.NEW) <= line["run"]["prompt"] <= 2048 - side.NEW
    assert lines[5].keys() == {"length", "memory_bytes"} and lines[5]["length"] == 2048
    assert lines[6]["length"] == 4096 and "context of 2,048" in lines[6]["error"] and len(lines) == 7


def test_a_longer_context_can_be_requested(roomy_model):
    request = LongRequest(str(roomy_model), {"context_extension": "yarn"}, lengths=[2048, 3000], tasks=["single"], samples=1)
    command = request.command(roomy_model, "flash")
    config = json.loads(command[command.index("--config") + 1])
    assert config == {"context_extension": "yarn", "context_length": 3000, "attention_optimization": "flash"}
    with pytest.warns(OptimizerWarning, match="is not assured"):
        lines = list(side.measure(_arguments(roomy_model, config=config, lengths=[3000])))
    assert [line.get("length") for line in lines] == [None, 3000, 3000] and lines[2]["memory_bytes"] is not None


def test_an_answer_ends_at_the_end_token(byte_tokenizer):
    import torch

    class Model:
        class generation_config:
            eos_token_id = [byte_tokenizer.eos_token_id, 7]

        def generate(self, ids, streamer, max_new_tokens, **_):
            assert self.generation_config.eos_token_id is None, "all tokens are timed"
            new = torch.tensor([[65, 66, 7, 67] + [68] * (max_new_tokens - 4)])
            streamer.put(ids)
            for token in new[0]:
                streamer.put(token)
            return torch.cat([ids, new], dim=1)

    times, ids = side._answer(Model(), byte_tokenizer, [1, 2, 3])
    assert ids == [65, 66] and len(times.times) == side.NEW and times.prompt == 3


def test_a_failed_length_does_not_affect_others(roomy_model, monkeypatch):
    def scored(model, tokenizer, sample):
        if sample.tokens > 1500:
            raise CacheFullError(9, 1)
        return {"score": score(sample.answers, " ".join(sample.answers)), "run": {}, "answer": ""}

    monkeypatch.setattr(side, "_scored", scored)
    lines = list(side.measure(_arguments(roomy_model, lengths=[2048, 1400])))
    assert lines[1]["length"] == 2048 and "KV cache: 9 more block(s) needed" in lines[1]["error"]
    assert lines[2]["score"] == 1 and lines[3]["length"] == 1400 and "memory_bytes" in lines[3]


def test_a_model_that_cannot_be_loaded(roomy_model, tmp_path):
    assert (
        "attention_optimization"
        in next(side.measure(_arguments(roomy_model, config={"attention_optimization": "no"})))["error"]
    )
    lines = list(side.measure(_arguments(tmp_path / "nowhere")))
    assert len(lines) == 1 and "nowhere" in lines[0]["error"]


def test_rows_have_means_and_medians_or_a_reason():
    lines = [
        {"backend": "cpu", "threads": 2, "load_s": 1.0},
        _measured("a"), _measured("b", score=0.0), _measured("c", task="qa", score=0.25),
        {"length": 2048, "memory_bytes": 5},
        {"length": 4096, "error": "too long"},
        {**_measured("d"), "length": 8192},
        {"error": "killed"},
    ]  # fmt: skip
    good, long, cut, never = rows_of("flash", [2048, 4096, 8192, 16384], lines)
    assert good == {
        "mode": "flash", "length": 2048, "error": None, "scores": {"single": [1.0, 0.0], "qa": [0.25]},
        "accuracy": {"single": 0.5, "qa": 0.25}, "mean": 0.375, "ttft_s": 2.0, "prefill_tok_s": 1000.0,
        "decode_tok_s": pytest.approx(10.0), "memory_bytes": 5,
    }  # fmt: skip
    assert (long["error"], cut["error"], never["error"]) == ("too long", "killed", "killed") and "scores" not in cut


def _sides(**modes):
    """Replaces the processes: mode -> its output lines."""

    def start(command):
        config = json.loads(command[command.index("--config") + 1])
        yield from modes[config["attention_optimization"]]

    return start


def test_unsupported_modes_are_reported_and_others_run(tmp_path):
    loaded = {"backend": "cpu", "threads": 2, "load_s": 1.0}
    sides = _sides(flash=[loaded, _measured("flash"), {"length": 2048, "memory_bytes": None}], sparse=[{"error": "not here"}])
    seen, notes = [], []
    request = LongRequest(str(tmp_path), lengths=[2048], modes=["flash", "sparse"], tasks=["single"], samples=1)
    report = run(request, lambda done, total: seen.append((done, total)), notes.append, sides)
    assert [(row["mode"], row["error"]) for row in report["rows"]] == [("flash", None), ("sparse", "not here")]
    assert report["sides"] == {"flash": loaded, "sparse": {}} and notes == ["flash", "sparse"]
    assert seen[0] == (0, 4096) and seen[-1] == (4096, 4096) and seen == sorted(seen)
    json.dumps(report)


def test_no_supported_mode_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not here"):
        run(LongRequest(str(tmp_path), modes=["sparse"]), side=_sides(sparse=[{"error": "not here"}]))


@pytest.mark.parametrize("fields, error", [({"precision": "int2"}, ConfigError), ({}, CheckpointError)])
def test_invalid_requests_start_no_process(tmp_path, fields, error):
    with pytest.raises(error, match="precision" if fields else "nowhere"):
        run(LongRequest(str(tmp_path if fields else tmp_path / "nowhere"), fields), side=_sides())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"modes": ["dense"]}, "modes: expected some of flash, sliding, sparse, got dense"),
        ({"tasks": []}, "tasks: expected some of single, .*, got none"),
        ({"lengths": [4096, 1000]}, "lengths: expected 1024 tokens or more, got 4096, 1000"),
        ({"lengths": []}, "lengths: .* got none"),
        ({"samples": 0}, "samples"),
    ],
)
def test_requests_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        LongRequest("m", **fields)


@pytest.mark.parametrize(
    "end, last",
    [
        ("", {"n": 1}),
        ("raise ValueError('what was wrong')", {"error": "ValueError: what was wrong"}),
        ("import os; os.kill(os.getpid(), 9)", {"error": "killed by signal 9, probably out of memory"}),
        ("raise SystemExit(3)", {"error": "no reason given"}),
    ],
)
def test_lines_of_a_process(end, last):
    lines = list(printed([sys.executable, "-c", f"print('noise'); print('{{\"n\": 1}}', flush=True); {end}"]))
    assert lines[0] == {"n": 1} and lines[-1] == last


def test_a_process_ends_with_its_reader():
    lines = printed(
        [sys.executable, "-c", "import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"]
    )
    pid = next(lines)["pid"]
    lines.close()
    with pytest.raises(ProcessLookupError):
        import os

        os.kill(pid, 0)
