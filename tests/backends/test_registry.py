"""The registry: entry points of other packages, devices, priorities, which backend is chosen, and errors."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer import BackendError, ConfigError, DeepSeekConfig, load_model
from deepseek_optimizer.backends import registry
from deepseek_optimizer.backends.base import Backend
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.backend import ReferenceSizes
from deepseek_optimizer.backends.registry import BackendSpec, choose_backend, choose_spec, find
from deepseek_optimizer.system import backend_entries

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class ToyBackend(ReferenceBackend):
    """A backend that another package might add: the reference under a new name."""

    name = "toy"
    note = "a toy serves"


TOY = BackendSpec("toy", lambda device, settings: ToyBackend(device), ReferenceSizes, device_types=("cpu",), priority=10)
LOST = BackendSpec("lost", lambda device, settings: 1 / 0, ReferenceSizes, lambda settings: "no such card", ("cpu",), 200)
OTHER_NAME = TOY
NOT_A_SPEC = ToyBackend


@pytest.fixture
def registered(monkeypatch):
    """registered(name=value, ...): sets the entry points of other packages."""

    def become(**values):
        points = [EntryPoint(name, value, backend_entries.GROUP) for name, value in values.items()]
        monkeypatch.setattr(backend_entries, "entry_points", lambda group: points if group == backend_entries.GROUP else [])
        backend_entries._installed.cache_clear()

    yield become
    monkeypatch.undo()
    backend_entries._installed.cache_clear()


def wanted(backend="auto", isa=None, threads=None):
    return SimpleNamespace(backend=backend, isa=isa, threads=threads)


def test_built_in_without_metadata(registered):
    registered()
    assert backend_entries.names() == ("cpu", "cuda", "reference")
    for name in backend_entries.names():
        assert find(name).name == name


def test_entry_points_match_the_built_in_backends():
    """pyproject.toml and the registry agree."""
    tomllib = pytest.importorskip("tomllib")
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][backend_entries.GROUP] == backend_entries.BUILT_IN


def test_another_package_adds_a_backend(registered, tiny_model):
    with pytest.raises(
        ConfigError, match="backend must be one of 'auto', 'cpu', 'cuda', 'reference', got 'toy'.*install that package"
    ):
        DeepSeekConfig(backend="toy")
    registered(toy=f"{__name__}:TOY")
    backend: Backend
    backend, note = choose_backend(DeepSeekConfig(backend="toy"), CPU)
    assert type(backend) is ToyBackend and note == "a toy serves"
    with pytest.warns(UserWarning, match="a toy serves"):
        model = load_model(tiny_model, backend="toy")
        assert model.report().backend == "toy"
    ids = torch.tensor([[1, 2, 3]])
    plain = load_model(tiny_model, backend="reference")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    with pytest.raises(BackendError, match=r"the toy backend cannot run a model on cuda:0; move it with model.to\('cpu'\)"):
        choose_spec(wanted("toy"), CUDA)


def test_auto_chooses_the_highest_available_priority(registered, monkeypatch):
    from deepseek_optimizer.backends import cpu

    registered(toy=f"{__name__}:TOY", lost=f"{__name__}:LOST")
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it was not built")
    monkeypatch.delenv("DSO_ISA", raising=False)
    spec, note = choose_spec(wanted(), CPU)
    assert spec is TOY and note == "using the toy backend, slower than the lost backend: no such card"
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: None)
    assert choose_spec(wanted(), CPU)[0].name == "cpu"
    registered()
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it was not built")
    spec, note = choose_spec(wanted(), CPU)
    assert spec.name == "reference" and note is not None
    assert note.startswith("using the reference backend, much slower than") and note.endswith("it was not built")


def test_other_devices(registered):
    registered(toy=f"{__name__}:TOY")
    spec, note = choose_spec(wanted(), CUDA)
    assert spec.name == "reference" and note == "the model is on cuda:0: using the reference backend"
    assert choose_spec(wanted("reference"), CUDA) == (spec, None)
    assert registry.runs_on("auto", "cuda") and registry.runs_on("reference", "cuda") and not registry.runs_on("cpu", "cuda")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module_anywhere:SPEC", "cannot be loaded .ModuleNotFoundError"),
        (f"{__name__}:MISSING", "cannot be loaded .AttributeError"),
        (f"{__name__}:OTHER_NAME", "is registered as .*:OTHER_NAME, which is not a BackendSpec of that name"),
        (f"{__name__}:NOT_A_SPEC", "is registered as .*:NOT_A_SPEC, which is not a BackendSpec of that name"),
    ],
)
def test_a_broken_package_is_named_and_does_not_stop_the_others(registered, value, message):
    registered(broken=value)
    with pytest.raises(BackendError, match=f"the backend 'broken' {message}.*reinstall or uninstall its package"):
        find("broken")
    spec, note = choose_spec(wanted(), CPU)
    assert spec.name in backend_entries.BUILT_IN and note is not None and "the backend 'broken'" in note


def test_unregistered_backends(registered):
    registered(toy=f"{__name__}:TOY")
    with pytest.raises(BackendError, match="there is no backend 'tox'; did you mean 'toy'"):
        find("tox")


def test_duplicate_names(registered):
    registered(cpu="their_package:SPEC")
    with pytest.raises(BackendError, match="two backends are called 'cpu': deepseek_optimizer.*their_package:SPEC"):
        backend_entries.names()
    assert find("cpu").priority == 100


def test_a_backend_that_cannot_be_created(registered):
    registered(lost=f"{__name__}:LOST")
    with pytest.raises(BackendError, match="the lost backend cannot be created .ZeroDivisionError"):
        choose_backend(wanted("lost"), CPU)
