"""The engine core of encoders: clients take turns, failures end only the requests of their step."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_optimizer import CheckpointChangedError, RequestError
from deepseek_optimizer.engine.encoder_core import Classifier, EncoderCore
from deepseek_optimizer.engine.model_facts import ModelFacts
from deepseek_optimizer.engine.options import EngineOptions
from deepseek_optimizer.engine.pooling import Pooling
from deepseek_optimizer.engine.request import Request


class Echo:
    """A text's hidden states are its token ids; its classes have the logits (sum of ids, sum of types)."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []
        self.error: Exception | None = None

    def check_weights(self):
        pass

    def states(self, texts, types):
        self.steps.append([list(text) for text in texts])
        if self.error is not None:
            raise self.error
        return [np.array(text, np.float32)[:, None] for text in texts]

    def logits(self, texts, types):
        self.states(texts, types)
        types = types or [[0]] * len(texts)
        return np.array([[sum(text), sum(kinds)] for text, kinds in zip(texts, types, strict=True)], np.float32)


def make(step_tokens=10, context=20, classifier=None, clock=lambda: 0.0):
    facts = ModelFacts(vocab_size=50, hidden_size=1, context=context, eos=frozenset())
    return EncoderCore(Echo(), facts, EngineOptions(step_tokens=step_tokens), classifier=classifier, clock=clock)


def test_embeddings():
    core = make()
    core.add(Request([1, 2, 6], id="a", embed=True))
    core.add(Request([4, 9], id="b", embed=True, pooling=Pooling(("cls", "lasttoken"))))
    outputs = {output.request_id: output for output in core.step()}
    assert outputs["a"].embedding == pytest.approx([3]) and outputs["b"].embedding.tolist() == [4, 9]
    assert outputs["a"].finish == "stop" and outputs["a"].prompt_tokens == 3
    assert core.idle and len(core.runner.steps) == 1 and core.metrics.prompt_tokens == 5


def test_clients_take_turns_within_the_budget():
    core = make(step_tokens=8)
    for i in range(6):
        core.add(Request([i + 1] * 4, id=f"a{i}", embed=True, client="a"))
    core.add(Request([40] * 4, id="b", embed=True, client="b"))
    core.step()
    assert core.runner.steps[0] == [[1] * 4, [40] * 4]
    assert core.load == (0, 5)
    while not core.idle:
        core.step()
    assert [len(step) for step in core.runner.steps] == [2, 2, 2, 1]


def test_a_text_larger_than_the_budget_runs_alone():
    core = make(step_tokens=2)
    core.add(Request([1] * 9, id="a", embed=True))
    core.add(Request([1], id="b", embed=True))
    assert [output.request_id for output in core.step()] == ["a"]


def test_classes_and_types():
    core = make(classifier=Classifier(("x", "y"), "softmax"))
    core.add(Request([1, 2], id="a", classify=True, token_types=(0, 1)))
    core.add(Request([3], id="b", classify=True))
    core.add(Request([3], id="c", embed=True))
    outputs = {output.request_id: output for output in core.step()}
    assert outputs["a"].scores.tolist() == [3, 1] and outputs["b"].scores.tolist() == [3, 0]
    assert outputs["c"].embedding.tolist() == [3]


@pytest.mark.parametrize(
    "request_,field",
    [
        (Request([1]), "model"), (Request([], embed=True), "prompt"), (Request([50], embed=True), "prompt"),
        (Request([-1], embed=True), "prompt"), (Request([1] * 21, embed=True), "prompt"),
        (Request([1], classify=True), "model"), (Request([1], embed=True, pooling=Pooling(skip=1)), "prompt"),
        (Request([1], embed=True, token_types=(0, 0)), "token_types"),
    ],
)  # fmt: skip
def test_impossible_requests(request_, field):
    with pytest.raises(RequestError) as error:
        make().check(request_)
    assert error.value.field == field


def test_failures_end_only_their_step():
    core = make(step_tokens=1)
    for name in "ab":
        core.add(Request([1], id=name, embed=True))
    core.runner.error = MemoryError("none")
    (failed,) = core.step()
    assert failed.request_id == "a" and failed.finish == "error" and failed.transient
    core.runner.error = None
    assert core.step()[0].finish == "stop"


def test_values_that_are_not_finite():
    core = make()
    core.runner.states = lambda texts, types: [np.full((1, 1), np.nan, np.float32) for _ in texts]
    core.add(Request([1], id="a", embed=True))
    assert core.step()[0].finish == "error" and core.idle


def test_changed_weights_end_the_engine():
    core = make()
    core.add(Request([1], id="a", embed=True))
    core.runner.error = CheckpointChangedError("was truncated", file="x")
    with pytest.raises(CheckpointChangedError):
        core.step()


def test_cancelled_and_late_requests():
    now = [0.0]
    core = make(clock=lambda: now[0])
    core.add(Request([1], id="a", embed=True))
    core.add(Request([1], id="b", embed=True, deadline=5.0))
    core.add(Request([1], id="c", embed=True, deadline=50.0))
    core.cancel("a")
    core.cancel("unknown")
    now[0] = 6.0
    assert {output.request_id: output.finish for output in core.step()} == {"a": "cancelled", "b": "deadline", "c": "stop"}
    assert core.metrics.finished == {"cancelled": 1, "deadline": 1, "stop": 1}
