"""The race of settings, with a function in place of measurements, and the comparison as a whole on a tiny model."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "tune_defaults.py").exists():
    pytest.skip("the benchmarks are not part of the package", allow_module_level=True)
sys.path.append(str(ROOT))

from benchmarks import tune_defaults, tune_race  # noqa: E402
from benchmarks.tune_traces import CASES  # noqa: E402

from deepseek_optimizer.tune.replay import ReplayTooLong  # noqa: E402
from deepseek_optimizer.tune.settings import Figures, Settings, space  # noqa: E402

DEFAULTS, VALUES = Settings(threads=2), space(2, 2, ("auto",))


class Pretended:
    """A machine with 10% of noise, on which small batches are slow, those of one are ended, and one setting is 20% better."""

    def __init__(self, better: Settings | None) -> None:
        self.better, self.rng, self.calls = better, random.Random(5), []

    def __call__(self, settings):
        self.calls.append(settings)
        while True:
            if settings.batch == 1:
                raise ReplayTooLong
            latency = (1 / 1.2 if settings == self.better else 1.0) * (2.0 if settings.batch == 2 else 1.0)
            yield Figures(latency * self.rng.uniform(0.95, 1.05), 0.1, 100.0, 1e6)


def raced(measure, candidates):
    plain = Figures(1.0, 0.1, 100.0, 1e6)
    return tune_race.race(measure, measure, candidates, DEFAULTS, plain, "latency", lambda _: None)


def test_the_better_settings_win():
    candidates = tune_defaults.drawn(VALUES, DEFAULTS, 200, seed=0)
    assert len(set(candidates)) == 200 and DEFAULTS not in candidates
    better = next(one for one in candidates if one.batch == 4)
    measure = Pretended(better)
    won = raced(measure, candidates)
    assert won.best == better and len(won.ratios) == tune_race.LAST and 1.1 < won.ratio < 1.3
    assert won.replayed == sum(one.batch > 1 for one in candidates)
    ended = [one for one in candidates if one.batch == 1]
    assert all(measure.calls.count(one) == 1 for one in ended)
    assert max(map(measure.calls.count, candidates)) == 2 + tune_race.PAIRS + tune_race.LAST
    last = measure.calls[-2 * tune_race.LAST :]
    assert {frozenset(last[n : n + 2]) for n in range(0, len(last), 2)} == {frozenset((better, DEFAULTS))}
    assert {last[n] for n in range(0, len(last), 2)} == {better, DEFAULTS}  # neither is always first


def test_the_luckiest_of_equal_settings_is_not_better():
    won = raced(Pretended(None), tune_defaults.drawn(VALUES, DEFAULTS, 200, seed=0))
    assert 0.95 < won.ratio < 1.05


def test_a_race_that_nobody_finishes_is_an_error():
    with pytest.raises(ValueError, match="every replay was ended"):
        raced(Pretended(None), [Settings(2, batch=1)])


@pytest.mark.parametrize("name", CASES)
def test_traces_grow_with_time(name):
    short, long = (CASES[name].make(seconds) for seconds in (1.0, 2.0))
    assert 5 <= len(short) < len(long) and all(a.at <= b.at for a, b in zip(long, long[1:], strict=False))
    assert all(0 <= one.shared_tokens < one.prompt_tokens for one in long) and any(one.group for one in long)


@pytest.mark.parametrize(
    ("gain", "ratio", "verdict"),
    [
        (0.16, None, "reached"),
        (0.1, None, "missed"),
        (0.16, 1.2, "reached"),
        (0.1, 1.02, "reached"),
        (0.1, 1.1, "missed"),
        (0.0, 0.9, "reached"),
    ],
)
def test_the_bar(gain, ratio, verdict):
    assert tune_defaults.verdict(gain, ratio) == verdict


def test_on_a_tiny_model(tiny_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    results = tmp_path / "results.json"
    options = ["tune_defaults", str(tiny_model), "--trace", "documents", "--settings", "3", "--trials", "2", "--random"]
    monkeypatch.setattr(sys, "argv", [*options, "--seconds", "0.3", "--results", str(results)])
    monkeypatch.setattr(tune_defaults, "LONGEST", 100.0)
    for name in ("PAIRS", "LAST"):
        monkeypatch.setattr(tune_race, name, 1)
    for _ in range(2):  # the second time from the file
        with pytest.raises(SystemExit):
            tune_defaults.main()
    out, entry = capsys.readouterr().out.splitlines(), json.loads(results.read_text())["documents"]
    assert len(out) == 2 and out[0] == out[1] and "random settings is" in out[0]
    assert entry["goal"] == "throughput" and len(entry["ratios"]) == 1 and entry["replayed"] == 3
