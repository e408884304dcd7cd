"""The harness with a few tests instead of Transformers': a broken model is reported, and so is a crash."""

from __future__ import annotations

import pytest

from conformance.compare import faults
from conformance.exceptions import KINDS
from conformance.run import run_family
from conformance.stage import HERE, stage

COMMON = """
import os
import torch

class ModelTesterMixin:
    def test_a_model_that_is_made_and_called(self):
        torch.manual_seed(0)
        model = self.model_tester.causal_lm_class(self.model_tester.get_config())
        assert ("dso" in model.__dict__) == (os.environ["DSO_CONFORMANCE_SIDE"] != "control")

    def test_that_ends_the_process(self):
        if os.environ["DSO_CONFORMANCE_SIDE"] != "control":
            os._exit(1)

def ids_tensor(shape, vocab_size):
    return torch.randint(0, vocab_size, shape)
"""
TRAINING = "class TrainingTesterMixin:\n    pass\n"


@pytest.fixture
def staged(tmp_path):
    tests = tmp_path / "source"
    tests.mkdir()
    (tests / "test_modeling_common.py").write_text(COMMON)
    (tests / "test_training_mixin.py").write_text(TRAINING)
    return stage(tests, tmp_path / "staged")


def names(comparison):
    return {test for test, _ in comparison.deviations}


def test_generation_tests_of_a_checkout_are_used(tmp_path):
    tests, checkout = tmp_path / "source", tmp_path / "checkout"
    tests.mkdir()
    (checkout / "generation").mkdir(parents=True)
    (checkout / "generation" / "test_utils.py").write_text("# theirs\n")
    for given, expected in ((None, (HERE / "generation.py").read_text()), (checkout, "# theirs\n")):
        file = stage(tests, tmp_path / f"staged-{given is None}", given)
        assert (file.parent / "generation" / "test_utils.py").read_text() == expected


@pytest.mark.slow  # each starts two processes that load torch and Transformers
@pytest.mark.parametrize(("side", "reported"), [("optimized", set()), ("broken", {"test_generate_greedy"})])
def test_a_broken_model_is_reported(staged, tmp_path, side, reported):
    comparison = run_family("llama", staged, tmp_path, "made_and_called or test_generate_greedy", side)
    assert comparison.control > 2
    assert reported <= names(comparison)
    assert bool(faults([comparison], KINDS, whole=False)) == bool(reported)


@pytest.mark.slow
def test_a_crash_is_a_deviation(staged, tmp_path):
    comparison = run_family("llama", staged, tmp_path, "ends_the_process")
    assert names(comparison) == {"test_that_ends_the_process"}
