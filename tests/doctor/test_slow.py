"""Slow answers: how each set of figures is read, and that the figures are measured."""

from __future__ import annotations

import pytest

from deepseek_optimizer import load_model
from deepseek_optimizer.doctor.case import Case
from deepseek_optimizer.doctor.symptoms import slow
from deepseek_optimizer.doctor.symptoms.slow import Decode
from support.multimodal import FAMILIES, make_model

GOOD = {"seconds": 0.010, "others": 0.0, "bytes": 400_000_000, "backend": "cpu", "threads": 2, "formats": ("int4",)}


def judged(**changes):
    return list(slow.judge(Decode(**{**GOOD, **changes}), bandwidth=50e9))  # 8 ms per token is the minimum


def test_near_the_limit(one):
    finding = one(judged(), "ok", "80% of the limit")
    assert finding.facts["floor_ms"] == pytest.approx(8) and not finding.fix


def test_near_the_limit_with_large_weights(one):
    assert "int4" in one(judged(formats=("bf16",)), "ok", "80% of the limit").fix


def test_far_from_the_limit(one):
    assert "threads" in one(judged(seconds=0.04), "warning", "20% of the limit").cause


def test_busy_processors(one):
    actual = judged(seconds=0.04, others=1.2)
    one(actual, "warning", "other processes used 1.2")
    assert "other processes" in one(actual, "warning", "20% of the limit").cause


def test_a_small_model(one):
    assert "so small" in one(judged(bytes=4_000_000), "note", "of the limit").cause


def test_the_reference_backend(one):
    actual = judged(seconds=3.0, backend="reference", threads=None)
    one(actual, "warning", "the reference backend runs")
    assert len(actual) == 1


def test_notes_of_the_model(one):
    actual = judged(notes=("module 'x' has forward hooks",))
    assert any(f.severity == "warning" and "forward hooks" in f.what for f in actual)


@pytest.mark.parametrize(("seconds", "reported"), [(0.02, True), (0.038, False), (0.05, False)])
def test_fewer_threads_are_tried_if_decoding_is_slow(case, tiny_model, one, monkeypatch, seconds, reported):
    timed = iter([Decode(**{**GOOD, "seconds": 0.04, "threads": 4}), Decode(**{**GOOD, "seconds": seconds, "threads": 2})])
    monkeypatch.setattr(slow, "measure_decode", lambda model: next(timed))
    monkeypatch.setattr("deepseek_optimizer.bench.machine_limits.read_gb_s", lambda size, threads: 50.0)
    actual = list(slow.measure(case(model=str(tiny_model))))
    assert next(timed, None) is None  # both were measured
    if reported:
        assert "threads=2" in one(actual, "warning", "threads=2 is faster than 4").fix
    assert len(actual) == 1 + reported


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_measured(tiny_model, backend):
    model = load_model(tiny_model, backend=backend)
    decode = slow.measure_decode(model)
    assert 0 < decode.seconds < 10 and decode.backend == model.report().backend
    assert 0 < decode.bytes <= model.report().bytes_after
    assert decode.others is None or 0 <= decode.others


def test_end_to_end(case, tiny_model):
    actual = list(slow.measure(case(model=str(tiny_model))))
    assert actual[0].facts["read_gb_per_s"] > 0  # further findings depend on other processes of this machine
    assert all(f.facts["ms_per_token"] > 0 for f in actual)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_models_that_see_are_measured_by_their_language_model(family, tmp_path):
    make_model(FAMILIES[family]).save_pretrained(tmp_path)
    with Case(model=str(tmp_path), fields={"threads": 1}) as case:
        decode = slow.measure_decode(case.loaded)
    assert decode.threads == 1 and decode.bytes > 0 and decode.seconds > 0
