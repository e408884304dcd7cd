"""Percentiles, and the definitions of the metrics, with made-up times."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deepseek_optimizer.bench.metrics import METRICS, figures, samples
from deepseek_optimizer.bench.runs import Run
from deepseek_optimizer.bench.statistics import median_error, percentile, summary
from deepseek_optimizer.bench.work import Work, grid, numbers


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentile_is_numpys(percent, count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentiles_are_towards_the_worse_end():
    values = [float(v) for v in range(101)]
    assert summary(values) == {"n": 101, "p50": 50, "p90": 90, "p95": 95, "p99": 99}
    assert summary(values, more_is_better=True) == {"n": 101, "p50": 50, "p90": 10, "p95": 5, "p99": 1}


@pytest.mark.parametrize("count, missing", [(5, ["p95", "p99"]), (19, ["p95", "p99"]), (20, ["p99"]), (99, ["p99"]), (100, [])])
def test_few_samples_have_no_high_percentiles(count, missing):
    actual = summary([float(v) for v in range(count)])
    assert actual["n"] == count and [name for name, value in actual.items() if value is None] == missing


def test_error_of_a_median():
    rng = np.random.default_rng(0)
    medians = [np.median(rng.normal(size=25)) for _ in range(4000)]
    errors = [median_error(rng.normal(size=25).tolist()) for _ in range(1000)]
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.05)
    assert median_error([1.0, 2.0]) is None


def test_figures_of_a_batch():
    # 2 rows of 100 prompt tokens; the first tokens after 0.5 s, then three more steps, 1.1 s in total
    run = Run(prompt=100, batch=2, times=(0.5, 0.6, 0.9, 1.1), generated=8)
    actual = {name: values[0] for name, values in samples([run]).items()}
    assert actual["ttft_ms"] == pytest.approx(500)
    assert actual["tpot_ms"] == pytest.approx((1.1 - 0.5) / 3 * 1e3)
    assert samples([run])["itl_ms"] == pytest.approx([100, 300, 200])
    assert actual["e2e_ms"] == pytest.approx(1100)
    assert actual["prefill_tok_s"] == pytest.approx(2 * 100 / 0.5)
    assert actual["decode_tok_s"] == pytest.approx(2 * 3 / 0.6)
    assert actual["output_tok_s"] == pytest.approx(8 / 1.1)
    assert actual["requests_s"] == pytest.approx(2 / 1.1)


def test_single_tokens_have_no_decode_metrics():
    actual = samples([Run(10, 1, (0.5,), 1)])
    assert not {"tpot_ms", "itl_ms", "decode_tok_s"} & actual.keys()
    assert actual["ttft_ms"] == [500]
    expected = {"unit": "ms", "n": 1, "p50": 500, "p90": 500, "p95": None, "p99": None, "samples": [500]}
    assert figures(actual)["ttft_ms"] == expected


def test_every_metric_is_defined():
    assert samples([Run(1, 1, (1.0, 2.0), 2)]).keys() <= METRICS.keys()
    assert all(math.isfinite(v) for v in summary([1.0] * 100).values())


def test_works():
    assert numbers("1,4,32") == [1, 4, 32]
    assert [(w.prompt, w.batch) for w in grid([8, 16], [4], [0], [1, 2])] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert Work(10, 5, depth=3).length == 18
    assert str(Work(10, 5, 3, 2)) == "10 in after 3, 5 out, batch 2"
    with pytest.raises(ValueError, match="commas"):
        numbers("1;2")
    for wrong in ({"prompt": 0}, {"new": 0}, {"depth": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Work(**wrong)
