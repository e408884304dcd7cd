"""The KL divergence that each group causes alone, against Transformers' logits, and its noise."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from deepseek_optimizer.backends.cpu import CpuBackend, unavailable_reason
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.calibration.groups import Group, format_groups
from deepseek_optimizer.calibration.sensitivity import Probe, measure
from deepseek_optimizer.graph import rules
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import PackedMatrix, get_format, pack, unpack
from support.models import CASES, random_ids, random_model

LENGTHS = (40, 33, 7)


def backend(name: str):
    if name == "reference":
        return ReferenceBackend(torch.device("cpu"))
    if reason := unavailable_reason():
        pytest.skip(reason)
    return CpuBackend()


def texts_of(model) -> list[torch.Tensor]:
    return [torch.tensor([random_ids(model.config, n, seed=n)]) for n in LENGTHS]


def packed_weights(model, format: str = "fp32"):
    """The weights of a plan of the model: packed matrices, unchanged vectors."""
    wanted = build_graph(model.config).weights()
    state = {name: t for name, t in model.state_dict().items() if name in wanted}
    return {name: pack(t, format) if t.ndim == 2 else t for name, t in state.items()}


def probe_of(model, name: str) -> Probe:
    return Probe(backend(name), build_graph(model.config), packed_weights(model), texts_of(model), "fp32")


@torch.no_grad()
def kl_by_transformers(model, other) -> float:
    terms = []
    for ids in texts_of(model):
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, other))
        terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean().item()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["llama-tied", "qwen3-gqa", "qwen2-windows"])
def test_an_unchanged_model_has_zero_kl_from_any_layer(case: str, name: str) -> None:
    probe = probe_of(random_model(CASES[case]()), name)
    for start in (None, 0, 1, 2, 3):
        assert probe.kl({}, start) < 1e-9


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("case", ["llama-tied", "llama-biases", "qwen3-gqa"])
def test_the_kl_of_a_group_equals_transformers(case: str, name: str) -> None:
    model = random_model(CASES[case]())
    probe = probe_of(model, name)
    matrices = [n for n, w in probe.weights.items() if isinstance(w, PackedMatrix)]
    groups = format_groups(rules.apply(probe.graph)[0], matrices)
    for group in (groups[0], groups[1], groups[-2], groups[-1]):
        changed = {n: pack(unpack(probe.weights[n]), "int8") for n in group.matrices}
        other = copy.deepcopy(model)
        with torch.no_grad():
            for n, matrix in changed.items():
                other.get_parameter(n).copy_(unpack(matrix))
        assert probe.kl(changed, group.start) == pytest.approx(kl_by_transformers(model, other), rel=0.05)
        assert probe.kl(changed, group.start) == pytest.approx(probe.kl(changed), rel=1e-3), "the same from the first layer on"


class Scripted:
    """A probe with given KL divergences, by the format of a group's first matrix."""

    def __init__(self, kls: dict[tuple[str, str], float], layers: int) -> None:
        self.graph = SimpleNamespace(hidden_states=layers + 1)
        self.weights = {name: SimpleNamespace(format="bf16", nbytes=160) for name, _ in kls}
        self.kls, self.calls = kls, []

    def size(self, group: Group) -> int:
        return sum(self.weights[n].nbytes for n in group.matrices)

    def kl(self, changed, start=None):
        (name, matrix), *_ = changed.items()
        self.calls.append((name, matrix.format, start))
        return self.kls[name, matrix.format]


def measured(probe: Scripted, groups: list[Group]):
    def repack(name, format):
        same = probe.weights[name].format == format
        return probe.weights[name] if same else SimpleNamespace(format=format, nbytes=int(10 * get_format(format).bits))

    return measure(probe, groups, lambda _, format: format or "bf16", repack)


def test_noise_is_counted_once_for_the_whole_model() -> None:
    kls = {
        ("a", "fp32"): 0.01, ("a", "int3"): 0.21, ("a", "int4"): 0.09, ("a", "q4_1"): 0.05, ("a", "int8"): 0.012,
        ("b", "fp32"): 0.01, ("b", "int3"): 0.07, ("b", "int4"): 0.03, ("b", "q4_1"): 0.008, ("b", "int8"): 1.0,
    }  # fmt: skip
    probe = Scripted(kls, layers=2)
    a, b = measured(probe, [Group(("a",), 0), Group(("b",), 1)])
    assert [(o.formats[0], o.bytes, o.kl) for o in a] == [
        ("int3", 32, pytest.approx(0.205)),
        ("int4", 45, pytest.approx(0.085)), ("q4_1", 50, pytest.approx(0.045)), ("int8", 85, pytest.approx(0.007)),
        ("bf16", 160, 0.0),
    ]  # fmt: skip
    assert [(o.formats[0], o.kl) for o in b] == [
        ("int3", pytest.approx(0.065)), ("int4", pytest.approx(0.025)), ("q4_1", pytest.approx(0.004)), ("bf16", 0.0),
    ]  # fmt: skip
    assert ("b", "int8", 1) not in probe.calls, "only noise is left"


def test_there_is_no_noise_after_the_last_state() -> None:
    kls = {("h", "int3"): 0.2, ("h", "int4"): 0.09, ("h", "q4_1"): 0.05, ("h", "int8"): 0.01}
    probe = Scripted(kls, layers=2)
    (h,) = measured(probe, [Group(("h",), 2)])
    assert [o.kl for o in h] == [0.2, 0.09, 0.05, 0.01, 0.0]
