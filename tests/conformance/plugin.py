"""A pytest plugin for the process that runs Transformers' tests: optimizes their models when they are created.

`DSO_CONFORMANCE_SIDE` is "control" (models stay plain), "optimized", or "broken" (optimized, then one norm is changed:
failures of such a model must be reported). Each test's outcome is written as a line of JSON to the file named by
`DSO_CONFORMANCE_RESULTS`, so that nothing is lost if the process crashes. Transformers' classes are patched here because their
tests create models by calling them; nothing outside this process is affected.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from support.outcomes import Recorder

SIDE, RESULTS = "DSO_CONFORMANCE_SIDE", "DSO_CONFORMANCE_RESULTS"
_plain = False


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.pluginmanager.register(Recorder(os.environ[RESULTS]))
    if os.environ[SIDE] != "control":
        from deepseek_optimizer.models import ENCODERS, SUPPORTED

        for family in (*SUPPORTED, *ENCODERS):
            patch(_tested_class(family))


def _tested_class(family: str) -> Any:
    """The class with a language model head; of an encoder the base model."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    from deepseek_optimizer.integration.compat import causal_lm_class
    from deepseek_optimizer.models import ENCODERS

    config_class = CONFIG_MAPPING[family]
    return MODEL_MAPPING[config_class] if family in ENCODERS else causal_lm_class(config_class)


def patch(model_class: Any) -> None:
    """Optimizes every model of exactly this class once it has its weights."""
    plain_init, plain_load = model_class.__init__, model_class.from_pretrained.__func__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if type(self) is model_class:
            optimize(self)

    @functools.wraps(plain_load)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = plain_load(cls, *args, **kwargs)
        if cls is model_class:
            optimize(made[0] if isinstance(made, tuple) else made)
        return made

    model_class.__init__ = init
    model_class.from_pretrained = classmethod(load)


@contextmanager
def plain_models() -> Iterator[None]:
    """A context in which new models stay plain."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def treated(model: Any) -> Any:
    """Converts a plain model to that of this side."""
    if os.environ[SIDE] != "control":
        optimize(model)
    return model


def optimize(model: Any) -> None:
    """Optimizes in fp32, in place; a model without weights, and its training mode, are deferred."""
    from deepseek_optimizer import DeepSeekConfig, DynamicGraphOptimizer

    if _plain or "dso" in model.__dict__ or model.device.type == "meta":
        return
    training = model.training
    DynamicGraphOptimizer(model, config=DeepSeekConfig(precision="fp32")).optimize()
    if os.environ[SIDE] == "broken":
        model.model.norm.weight.data.mul_(2)
        model.dso.rebind()
    model.train(training)
