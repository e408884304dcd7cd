"""Results of a batch job: each request once, in order, whatever interrupts the job."""

from __future__ import annotations

import json
import random

import pytest

from deepseek_optimizer.batch.results import Results
from deepseek_optimizer.checkpoint.locks import HAS_LOCKS
from deepseek_optimizer.errors import DataError

JOB = {"input": "1234", "model": "m"}


def line_of(index):
    return {"custom_id": f"request {index}", "response": {"body": {"text": "é" * (index % 7), "n": index}}, "error": None}


def expected(count):
    return "".join(json.dumps(line_of(i), ensure_ascii=False, separators=(",", ":")) + "\n" for i in range(count))


def finish(output, count, seed=1):
    with Results(output, JOB, count) as results:
        missing = [i for i in range(count) if i not in results.done]
        random.Random(seed).shuffle(missing)
        for index in missing:
            results.add(index, line_of(index))
        results.finish()
    return missing


def test_the_output_is_in_order(tmp_path):
    output = tmp_path / "new folder" / "out.jsonl"
    finish(output, 20)
    assert output.read_text(encoding="utf-8") == expected(20)
    assert [p.name for p in output.parent.iterdir()] == ["out.jsonl"]


def test_a_job_goes_on_after_any_byte(tmp_path):
    """The partial file may end anywhere when a job is killed: every byte of its first lines, and some of the others."""
    rng, output = random.Random(0), tmp_path / "out"
    with Results(output, JOB, 9) as results:
        for index in rng.sample(range(9), 7):
            results.add(index, line_of(index))
    whole = results.partial.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]  # of complete lines, the first of which names the job
    for size in [*range(ends[1] + 2), *rng.sample(range(ends[1], len(whole)), 30), len(whole)]:
        results.partial.write_bytes(whole[:size])
        complete = [json.loads(line)["index"] for line in whole[:size].splitlines()[1:][: sum(e <= size for e in ends[1:])]]
        assert sorted(finish(output, 9, size)) == sorted(set(range(9)) - set(complete))
        assert output.read_text(encoding="utf-8") == expected(9)
        output.unlink()


def test_a_finished_job_that_did_not_write_its_output(tmp_path):
    output = tmp_path / "out"
    with Results(output, JOB, 3) as results:
        for index in (2, 0, 1):
            results.add(index, line_of(index))
    assert finish(output, 3) == []
    assert output.read_text(encoding="utf-8") == expected(3)


def test_another_job_is_refused(tmp_path):
    output = tmp_path / "out"
    with Results(output, JOB, 3) as results:
        results.add(1, line_of(1))
    with pytest.raises(DataError, match=r"out\.partial: a job with another input and model was stopped here"):
        Results(output, {"input": "5", "model": "n"}, 3)
    with Results(output, JOB, 3) as results:  # it is as it was
        assert results.done == {1}
    results.partial.write_text("anything\n")
    with pytest.raises(DataError, match="not the partial file of a batch job"):
        Results(output, JOB, 3)


def test_an_existing_output_is_kept(tmp_path):
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(DataError, match="the file exists"):
        Results(output, JOB, 3)
    assert output.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not HAS_LOCKS, reason="this system has no file locks")
def test_one_process_at_a_time(tmp_path):
    output = tmp_path / "out"
    with Results(output, JOB, 3), pytest.raises(DataError, match="another process is running this job"):
        Results(output, JOB, 3)
    Results(output, JOB, 3).__exit__(None, None, None)
