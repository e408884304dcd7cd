"""Results of a batch job: each request once, in order, whatever interrupts the job."""

from __future__ import annotations

import json
import random

import pytest

from deepseek_optimizer.batch import results as batch_results
from deepseek_optimizer.batch.results import Results
from deepseek_optimizer.checkpoint.locks import HAS_LOCKS, hold
from deepseek_optimizer.errors import DataError

JOB = {"input": "1234", "model": "m"}


def line_of(index):
    return {
        "custom_id": f"request {index}",
        "response": {"body": {"text": "é" * (index % 7), "n": index}, "status_code": 200},
        "error": None,
    }


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


def test_errors_of_earlier_runs_count(tmp_path):
    with Results(tmp_path / "out", JOB, 3) as results:
        results.add(1, {"response": {"status_code": 400}})
    with Results(tmp_path / "out", JOB, 3) as results:
        results.add(0, line_of(0))
        assert results.failed == {1} and results.done == {0, 1}


def test_the_time_is_that_of_the_first_run(tmp_path):
    for written in (5, 9):
        with Results(tmp_path / "out", JOB, 3, written) as results:
            assert results.written == 5


def test_zeros_after_a_power_failure(tmp_path):
    """Blocks of the file that were not written are zeros, also before ones that were."""
    output = tmp_path / "out"
    with Results(output, JOB, 4) as results:
        for index in (2, 0, 3):
            results.add(index, line_of(index))
    lines = results.partial.read_bytes().splitlines(keepends=True)
    results.partial.write_bytes(b"".join([*lines[:2], bytes(len(lines[2])), lines[3]]))
    assert sorted(finish(output, 4)) == [0, 1, 3]
    assert output.read_text(encoding="utf-8") == expected(4)


def test_another_file_of_the_name_is_kept(tmp_path):
    (tmp_path / "out.partial").write_text("one line of something else")
    with pytest.raises(DataError, match="not the partial file of a batch job"):
        Results(tmp_path / "out", JOB, 3)
    assert (tmp_path / "out.partial").read_text() == "one line of something else"


@pytest.mark.skipif(not HAS_LOCKS, reason="this system has no file locks")
def test_a_job_that_another_process_ends_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    def hold_late(path):
        (tmp_path / "out").write_text("done")
        return hold(path)

    monkeypatch.setattr(batch_results, "hold", hold_late)
    with pytest.raises(DataError, match="the file exists"):
        Results(tmp_path / "out", JOB, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
