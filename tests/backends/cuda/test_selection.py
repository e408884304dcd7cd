"""How the backend is chosen, and what is said where it cannot run. No Triton is needed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.backends import cuda
from deepseek_optimizer.backends.registry import choose_backend, choose_spec, find
from deepseek_optimizer.errors import BackendError

CARD = torch.device("cuda:0")


def wanted(backend="auto"):
    return SimpleNamespace(backend=backend, isa=None, threads=None)


@pytest.fixture
def machine(monkeypatch):
    """machine(...): what is installed, and the card that torch finds, None for none."""

    def become(triton=True, capability=(9, 0)):
        monkeypatch.setattr(cuda, "find_spec", lambda name: SimpleNamespace() if triton else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    return become


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"triton": False}, r'Triton is not installed: pip install "deepseek-optimizer\[cuda\]"'),
        ({"capability": None}, "torch finds no CUDA device: install NVIDIA's driver and a build of torch for CUDA, or keep"),
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
