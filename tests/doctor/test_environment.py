"""Each environment variable that slows a model down, and values that do no harm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deepseek_optimizer.doctor.checks import environment

HARMFUL = [
    ("OMP_NUM_THREADS", "8"), ("OMP_NUM_THREADS", "8,2"), ("MKL_NUM_THREADS", "5"), ("OPENBLAS_NUM_THREADS", "64"),
    ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "infinite"), ("KMP_BLOCKTIME", "infinite"), ("KMP_BLOCKTIME", "1000"),
    ("OMP_PROC_BIND", "true"), ("OMP_PROC_BIND", "close"), ("GOMP_CPU_AFFINITY", "0-3"), ("OPENBLAS_CORETYPE", "Haswell"),
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2"), ("ATEN_CPU_CAPABILITY", "default"), ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ("DNNL_MAX_CPU_ISA", "SSE41"), ("MALLOC_PERTURB_", "165"), ("CUDA_LAUNCH_BLOCKING", "1"),
]  # fmt: skip
HARMLESS = [
    ("OMP_NUM_THREADS", "4"), ("OMP_NUM_THREADS", "many"), ("MKL_NUM_THREADS", "2"), ("OMP_WAIT_POLICY", "passive"),
    ("GOMP_SPINCOUNT", "1000"), ("KMP_BLOCKTIME", "0"), ("KMP_BLOCKTIME", "200ms"), ("OMP_PROC_BIND", "FALSE"),
    ("ATEN_CPU_CAPABILITY", "avx512"), ("ONEDNN_MAX_CPU_ISA", "ALL"), ("MALLOC_PERTURB_", "0"), ("CUDA_LAUNCH_BLOCKING", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value"), HARMFUL)
def test_harmful(case, machine, one, variable, value):
    finding = one(environment.check(case(machine=machine(environ={variable: value}))), "warning", f"{variable}={value} ")
    assert finding.facts[variable] == value


@pytest.mark.parametrize(("variable", "value"), HARMLESS)
def test_harmless(case, machine, variable, value):
    actual = list(environment.check(case(machine=machine(environ={variable: value}))))
    assert [f.severity for f in actual] == ["ok"]


@pytest.mark.parametrize(("variable", "value"), [("OMP_NUM_THREADS", "1"), ("MKL_DEBUG_CPU_TYPE", "5")])
def test_notes(case, machine, one, variable, value):
    one(environment.check(case(machine=machine(environ={variable: value}))), "note", variable)


def test_one_thread_is_right_on_one_processor(case, machine):
    actual = list(environment.check(case(machine=machine(environ={"OMP_NUM_THREADS": "1"}, usable_cpus=1))))
    assert [f.severity for f in actual] == ["ok"]


def test_every_rule_has_a_case():
    shown = {variable for variable, _ in HARMFUL} | {"MKL_DEBUG_CPU_TYPE"}
    assert {rule.variable for rule in environment.RULES} == shown


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="reads Linux's affinity")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_binding_reduces_the_usable_processors():
    """The claim of the rule for OMP_PROC_BIND: after loading torch the process may use fewer processors."""
    code = "import os, torch; torch.ones(300, 300) @ torch.ones(300, 300); print(len(os.sched_getaffinity(0)))"
    counts = []
    for bind in ("false", "true"):
        env = {**os.environ, "OMP_PROC_BIND": bind, "OMP_NUM_THREADS": "2"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    if counts[0] < 2:
        pytest.skip("this process may use one processor only")
    assert counts[1] < counts[0]
