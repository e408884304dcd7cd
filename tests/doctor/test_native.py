"""The native build: present, missing or broken; and which of its kernels run."""

from __future__ import annotations

import pytest

from deepseek_optimizer.backends.cpu import native as library
from deepseek_optimizer.backends.cpu import unavailable_reason
from deepseek_optimizer.doctor.checks import features, native

needs_native = pytest.mark.skipif(unavailable_reason() is not None, reason="no native build")


@pytest.fixture
def at(monkeypatch):
    """at(path): sets the path of the library."""

    def move(path):
        monkeypatch.setattr(library, "library_path", lambda: path)
        library.library.cache_clear()

    yield move
    monkeypatch.undo()
    library.library.cache_clear()


@needs_native
def test_it_loads(case, one):
    one(native.check(case()), "ok", "loads")


def test_missing(case, one, at, tmp_path):
    at(tmp_path / "libdso.so")
    assert "compiler" in one(native.check(case()), "warning", "no native library").fix
    assert list(features.check(case())) == []


def test_broken(case, one, at, tmp_path):
    (tmp_path / "libdso.so").write_bytes(b"not a library")
    at(tmp_path / "libdso.so")
    assert "libdso.so" in one(native.check(case()), "error", "cannot be used").cause


@needs_native
def test_every_feature_is_reported(case, one):
    finding = one(features.check(case()), "ok", "kernels run")
    known, actual = library.cpu_description()["features"], finding.facts["features"]
    # The table matches the library.
    assert set(known) <= {*features.first_used(), *features.WITHOUT_KERNELS}
    assert set(features.first_used().values()) == {name for name in library.isa_names() if "emulated" not in name}
    assert actual[known[0]].startswith("used") and set(actual) >= set(features.first_used())
    assert finding.facts["isas"][finding.facts["isa"]] == "runs here"
    for name in set(features.first_used()) - set(known):
        assert actual[name] == "not on this CPU"


@needs_native
def test_forced_below_the_best(case, one):
    if features.why_not("avx512"):
        pytest.skip("avx2 is the best here")
    finding = one(features.check(case(fields={"isa": "avx2"})), "warning", "though this CPU can run")
    assert finding.facts["features"]["avx512f"].startswith("not used")


@needs_native
def test_forced_above_the_best(case, one):
    if not features.why_not("amx"):
        pytest.skip("this CPU has AMX")
    assert "amx_tile" in one(features.check(case(fields={"isa": "amx"})), "error", "cannot run here").cause


@needs_native
def test_the_environment_forces_an_isa(case, one, monkeypatch):
    monkeypatch.setenv("DSO_ISA", "avx1024")
    assert "unknown ISA" in one(features.check(case()), "error", "DSO_ISA=avx1024 cannot run here").cause


@needs_native
def test_disabled_by_the_system(case, machine, one):
    if "amx_tile" in library.cpu_description()["features"]:
        pytest.skip("this CPU has AMX, and the system lets it be used")
    cpu = machine({"/proc/cpuinfo": "model name: X\nflags\t\t: fpu avx2 amx_tile avx512_fp16\n"})
    actual = list(features.check(case(machine=cpu)))
    one(actual, "warning", "has amx_tile, but programs may not use it")
    fates = one(actual, "ok", "kernels run").facts["features"]
    assert fates["amx_tile"] == "disabled by the system" and fates["avx512_fp16"] == "no kernel here uses it"
