"""Which checks run for which symptom, and unknown names."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.doctor import SYMPTOMS, Case, Machine, examine, examine_symptom
from deepseek_optimizer.doctor.checks import OF_THE_MACHINE, OF_THE_MODEL
from deepseek_optimizer.errors import ConfigError


def test_every_check_reports(tiny_model):
    with Case(model=str(tiny_model)) as whole:
        actual = examine(whole)
    spoken = {finding.check for finding in actual}
    assert spoken >= {*OF_THE_MACHINE, *OF_THE_MODEL} - {"CPU features"}  # it reports nothing without a native build


def test_the_machine_alone():
    with Case() as alone:
        assert {f.check for f in examine(alone)} <= set(OF_THE_MACHINE)


def test_checks_that_symptoms_name_exist():
    for symptom in SYMPTOMS.values():
        assert set(symptom.checks) <= {*OF_THE_MACHINE, *OF_THE_MODEL}


@pytest.mark.parametrize("name", [n for n, symptom in SYMPTOMS.items() if symptom.needs_model])
def test_a_symptom_that_needs_a_model(case, name):
    with pytest.raises(ConfigError, match="needs a model"):
        examine_symptom(case(), name)


@pytest.mark.parametrize("name", [n for n, symptom in SYMPTOMS.items() if symptom.loads])
def test_a_model_that_cannot_be_loaded_is_the_cause(case, model_copy, name):
    (model_copy.path / "model.safetensors").write_bytes(b"")
    actual = examine_symptom(case(model=str(model_copy.path)), name)
    assert actual[-1].check == "checkpoint" and actual[-1].severity == "error"


@pytest.mark.parametrize(("variable", "value"), [("DSO_ISA", "avx1024"), ("DSO_THREADS", "0")])
def test_an_environment_in_which_no_model_loads(tiny_model, monkeypatch, variable, value):
    if unavailable_reason() is not None:
        pytest.skip("no native build")
    monkeypatch.setenv(variable, value)
    with Case(model=str(tiny_model)) as given:
        for actual in (examine(given), examine_symptom(given, "slow")):
            assert [f.what for f in actual if f.severity == "error"][0].startswith(variable)


def test_out_of_memory_names_what_does_not_fit(case, machine, tiny_model):
    actual = examine_symptom(case(model=str(tiny_model), machine=machine(available_bytes=1000)), "out-of-memory")
    assert [f.check for f in actual if f.severity == "error"] == ["memory"]


def test_a_misspelt_symptom(case):
    with pytest.raises(ConfigError, match="did you mean 'garbage'"):
        examine_symptom(case(), "garbadge")


def test_the_machine_here():
    here = Machine.here()
    assert here.usable_cpus >= 1 and here.memory.free > 1 << 20 and "torch" in here.packages
    assert here.read("/no/such/file") == ""
