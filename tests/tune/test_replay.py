"""Measuring a model: requests that fit its context, scheduled as a server does."""

from __future__ import annotations

from deepseek_optimizer import serving
from deepseek_optimizer.tune.replay import ModelMeasure
from deepseek_optimizer.tune.settings import Settings
from deepseek_optimizer.tune.traces import TraceRequest


def test_a_text_longer_than_the_context(tiny_model, monkeypatch):
    seen, make = [], serving.make_engine

    def record(*arguments, **options):
        seen.append(options)
        return make(*arguments, **options)

    monkeypatch.setattr(serving, "make_engine", record)
    measured = ModelMeasure(tiny_model, {}, (TraceRequest(0.0, 1, 3, prompt="word " * 5000),))(Settings(threads=1))
    figures = next(measured)
    measured.close()
    assert figures.tok_s > 0 and figures.kl == 0 and seen[0]["stall"] == serving.STALL
