"""Measuring a model: requests that fit its context, scheduled as a server does, and models that are loaded once."""

from __future__ import annotations

import pytest

from deepseek_optimizer import optimized_model, serving
from deepseek_optimizer.tune.replay import ModelMeasure
from deepseek_optimizer.tune.settings import Settings
from deepseek_optimizer.tune.traces import TraceRequest

TRACE = (TraceRequest(0.0, 40, 3), TraceRequest(0.0, 30, 3))


@pytest.fixture
def engines(monkeypatch):
    """The options and the core of each engine that was made."""
    seen, make = [], serving.make_engine

    def record(*arguments, **options):
        engine = make(*arguments, **options)
        seen.append((options, engine.core))
        return engine

    monkeypatch.setattr(serving, "make_engine", record)
    return seen


@pytest.fixture
def loads(monkeypatch):
    """The fields of each model that was loaded."""
    seen, load = [], optimized_model.load_model

    def record(path, **fields):
        seen.append(fields)
        return load(path, **fields)

    monkeypatch.setattr(optimized_model, "load_model", record)
    return seen


def once(measure, settings):
    measured = measure(settings)
    figures = next(measured)
    measured.close()
    return figures


def test_a_text_longer_than_the_context(tiny_model, engines):
    trace = (TraceRequest(0.0, 1, 3, prompt="word " * 5000),)
    figures = once(ModelMeasure(tiny_model, {}, trace), Settings(threads=1))
    assert figures.tok_s > 0 and figures.kl == 0 and engines[0][0]["stall"] == serving.STALL


def test_a_model_serves_other_settings_as_if_it_were_loaded_with_them(tiny_model, engines, loads):
    small, large = Settings(1, prefill_chunk=8, batch=1, drafts=0), Settings(1, prefill_chunk=512, batch=2)
    reused = ModelMeasure(tiny_model, {}, TRACE)
    for settings in (small, large, small):
        once(reused, settings)
    assert len(loads) == 1
    for settings in (small, large):
        once(ModelMeasure(tiny_model, {}, TRACE), settings)
    cores = [core for _, core in engines]
    for core, same in zip(cores[:3], (cores[3], cores[4], cores[3]), strict=True):
        assert core.options == same.options and (core.drafting is None) == (same.drafting is None)
        assert core.memory.size.bytes == same.memory.size.bytes
    assert cores[0].memory.size.bytes < cores[1].memory.size.bytes and cores[0].options != cores[1].options


@pytest.mark.parametrize(("models", "expected"), [(1, 3), (2, 2)])
def test_other_threads_need_another_load(tiny_model, loads, models, expected):
    measure = ModelMeasure(tiny_model, {}, TRACE, models=models)
    for threads in (1, 2, 1):
        once(measure, Settings(threads))
    assert len(loads) == expected and [fields["threads"] for fields in loads] == [1, 2, 1][:expected]
