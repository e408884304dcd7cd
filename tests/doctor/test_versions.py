"""Incompatible packages, by their metadata and by known conflicts."""

from __future__ import annotations

import pytest

from deepseek_optimizer.doctor import Machine
from deepseek_optimizer.doctor.checks import versions
from deepseek_optimizer.doctor.machine import Package

GOOD = {
    "torch": Package("2.13.0+cpu"),
    "transformers": Package("5.24.0", ("tokenizers<=0.24,>=0.22", "torch>=2.4; extra == 'torch'")),
}


def test_compatible_packages(case, machine, one):
    assert one(versions.check(case(machine=machine(packages=GOOD))), "ok", "torch 2.13.0+cpu").facts["transformers"] == "5.24.0"


def test_this_installation_is_compatible():
    """The environment of the tests is valid, so this detects false alarms."""
    from deepseek_optimizer.doctor import Case

    assert [f.severity for f in versions.check(Case(machine=Machine.here()))] == ["ok"]


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"torchvision": Package("0.24.0", ("torch==2.9.0",))}, "torchvision 0.24.0 does not work with torch 2.13.0+cpu"),
        ({"tokenizers": Package("0.21.0")}, "transformers 5.24.0 does not work with tokenizers 0.21.0"),
        ({"deepseek-optimizer": Package("0.1.0", ("transformers<6,>=5.25",))}, "does not work with transformers 5.24.0"),
        ({"torchvision": Package("0.28.0+cu128")}, "built for cu128, torch 2.13.0+cpu for cpu"),
        ({"torchaudio": Package("2.13.0+cu130")}, "built for cu130"),
    ],
)
def test_incompatible_pairs(case, machine, one, extra, text):
    one(versions.check(case(machine=machine(packages={**GOOD, **extra}))), "error", text)


def test_uninstalled_extras_do_not_count(case, machine):
    packages = {**GOOD, "accelerate": Package("1.10", ("torch>=99; extra == 'future'", "not a requirement ]["))}
    assert [f.severity for f in versions.check(case(machine=machine(packages=packages)))] == ["ok"]


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_missing(case, machine, name):
    packages = {n: p for n, p in GOOD.items() if n != name}
    actual = list(versions.check(case(machine=machine(packages=packages))))
    assert [(f.severity, f.what) for f in actual] == [("error", f"{name} is not installed")]
