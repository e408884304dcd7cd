"""Shared by all tests: one torch thread, no network, red zones, and a tiny model of a supported family with its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.rings import FEW, Costs, Rings, seed_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DSO_CALIBRATION", "none")  # tests that round compare with plain rounding unless they name a text
os.environ.setdefault("DSO_CHECK", "1")  # red zones around every buffer that the native library writes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-wide", action="store_true", help="measure all functions, and list the costly ones in wide.txt")
    parser.addoption("--few", type=int, default=FEW, help="unmarked cases of a function, at most (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    rings = Rings(seed_of(config.rootpath), config.getoption("--few"))
    config.pluginmanager.register(Costs() if config.getoption("--write-wide") else rings)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Before each test, as a test may leave another number: threads that wait for each other use up the processors."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level tokenizer of 256 bytes and a few special tokens, with a chat template; nothing is downloaded."""
    from support.byte_tokenizer import new_byte_tokenizer

    return new_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, byte_tokenizer) -> Path:
    """A saved Llama of two small layers with random weights, and its tokenizer. Treat it as read-only."""
    from support.saved_llama import saved_llama

    return saved_llama(tmp_path_factory.mktemp("tiny") / "model", byte_tokenizer)
