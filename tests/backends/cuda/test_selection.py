"""How the backend is chosen, and what is said where it cannot run. No Triton is needed."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.registry import choose_backend, choose_spec, find
from deepseek_optimizer.errors import BackendError
from support.pretended_card import OLD_DRIVER, pretend

CARD = torch.device("cuda:0")


def wanted(backend="auto"):
    return SimpleNamespace(backend=backend, isa=None, threads=None, cuda_graphs=True)


@pytest.fixture
def machine(monkeypatch):
    """See `pretended_card.pretend`."""
    return partial(pretend, monkeypatch)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"triton": False}, r'Triton is not installed: pip install "deepseek-optimizer\[cuda\]"'),
        (
            {"failure": OLD_DRIVER},
            "NVIDIA's driver is too old for torch .*, which is built for CUDA 13.0: update the",
        ),
        (
            {"failure": "Found no NVIDIA driver"},
            "torch finds no CUDA device: install NVIDIA's .* .Found no NVIDIA driver.",
        ),
        ({"build": None}, r"torch .* is a build for the CPU: install a build for CUDA .*, or keep the model on the CPU"),
        ({"capability": (7, 5)}, 'a card has compute capability 7.5, but 8.0 .* is needed: use backend="reference"'),
    ],
)
def test_why_it_cannot_run(machine, state, said):
    machine(**state)
    with pytest.raises(BackendError, match=f"the cuda backend cannot run: {said}"):
        choose_backend(wanted("cuda"), CARD)


def test_any_card_since_ampere_is_enough(machine):
    machine(capability=(8, 0))
    assert cuda.unavailable_reason(CARD) is None


def test_it_is_chosen_by_name_only(machine):
    machine()
    assert choose_spec(wanted("cuda"), CARD) == (cuda.SPEC, None)
    spec, note = choose_spec(wanted(), CARD)
    assert spec.name == "reference" and note == "the model is on cuda:0: using the reference backend"


def test_models_on_the_cpu_are_moved():
    with pytest.raises(BackendError, match=r"the cuda backend cannot run a model on cpu; move it with model.to\('cuda'\)"):
        choose_spec(wanted("cuda"), torch.device("cpu"))


def test_sizes_are_known_without_triton_or_a_card():
    code = (
        "import sys; from deepseek_optimizer.backends.registry import find; find('cuda').sizes(); "
        "print([name for name in sys.modules if 'cuda.kernels' in name or 'cuda.sizes' in name])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['deepseek_optimizer.backends.cuda.sizes']"
    assert find("cuda") is cuda.SPEC
