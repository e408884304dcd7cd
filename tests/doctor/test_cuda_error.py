"""CUDA: mismatches of driver, build and card. The facts are made up, so no card is needed."""

from __future__ import annotations

import pytest

from deepseek_optimizer.doctor import examine_symptom
from deepseek_optimizer.doctor.symptoms import cuda_error
from deepseek_optimizer.doctor.symptoms.cuda_error import Cuda, Device

H100 = Device("H100", (9, 0))
KERNELS = ("sm_80", "sm_86", "sm_90", "sm_120")
DRIVER = "NVRM version: NVIDIA UNIX {}x86_64 Kernel Module  {}  Tue Jan 1 00:00:00 UTC 2026\nGCC version: 12\n"


def judged(machine, build="13.0", driver="580.95.05", devices=(H100,), kernels=KERNELS, failure="", **environ):
    return list(cuda_error.judge(Cuda("2.13.0", build, driver, devices, kernels, failure), machine(environ=environ)))


def test_a_working_installation(machine, one):
    one(judged(machine), "ok", "H100 computes")


def test_no_cuda_at_all(machine, one):
    one(judged(machine, build=None, driver=None, devices=()), "ok", "CUDA is not used")


def test_a_cpu_build_on_a_machine_with_a_card(machine, one):
    one(judged(machine, build=None, devices=()), "error", "is a CPU build")


def test_no_driver(machine, one):
    actual = judged(machine, driver=None, devices=(), failure="Found no NVIDIA driver")
    finding = one(actual, "error", "there is no NVIDIA driver")
    assert "Found no NVIDIA driver" in finding.cause and "--gpus" in finding.fix


@pytest.mark.parametrize(("build", "driver"), [("13.0", "575.57.08"), ("12.8", "525.60.12"), ("11.8", "418.40")])
def test_an_old_driver(machine, one, build, driver):
    one(judged(machine, build=build, driver=driver, devices=()), "error", f"{driver} is too old for CUDA {build}")


@pytest.mark.parametrize(("build", "driver"), [("13.0", "580.65.06"), ("12.8", "525.60.13"), ("12.8", "580.95.05")])
def test_a_driver_just_new_enough(machine, one, build, driver):
    one(judged(machine, build=build, driver=driver), "ok", "computes")


@pytest.mark.parametrize("visible", ["", "-1", "7"])
def test_hidden_cards(machine, one, visible):
    one(judged(machine, devices=(), CUDA_VISIBLE_DEVICES=visible), "error", "hides every GPU")


def test_no_card(machine, one):
    assert one(judged(machine, devices=(), failure="unknown error"), "error", "finds no GPU").cause == "unknown error"


@pytest.mark.parametrize("capability", [(7, 0), (10, 0)])
def test_no_code_for_the_card(machine, one, capability):
    one(judged(machine, devices=(Device("Card", capability),)), "error", "has no machine code for Card")


@pytest.mark.parametrize(
    ("capability", "kernels"), [((8, 9), ("sm_80",)), ((9, 0), ("sm_90a",)), ((10, 0), ("compute_90",)), ((12, 1), ("sm_120",))]
)
def test_code_that_later_cards_can_use(machine, one, capability, kernels):
    one(judged(machine, devices=(Device("Card", capability),), kernels=kernels), "ok", "Card computes")


def test_a_card_that_fails(machine, one):
    broken = Device("H100", (9, 0), "CUDA error: an illegal memory access was encountered\nmore")
    finding = one(judged(machine, devices=(broken,)), "error", "illegal memory access")
    assert "CUDA_LAUNCH_BLOCKING" in finding.fix and "more" not in finding.what


def test_a_card_without_memory(machine, one):
    full = Device("H100", (9, 0), "CUDA out of memory. Tried to allocate 20 MiB")
    assert "nvidia-smi" in one(judged(machine, devices=(full,)), "error", "out of memory").fix


def test_libraries_of_another_cuda(machine, one):
    actual = judged(machine, LD_LIBRARY_PATH="/opt/lib:/usr/local/cuda-11.8/lib64")
    assert "/usr/local/cuda-11.8/lib64" in one(actual, "warning", "LD_LIBRARY_PATH").what and len(actual) == 2


@pytest.mark.parametrize("kind", ["", "Open Kernel Module for "])
def test_the_drivers_version_is_read(machine, kind):
    text = DRIVER.format("", "580.95.05") if not kind else (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)\n"
    )  # fmt: skip
    assert cuda_error.look(machine({"/proc/driver/nvidia/version": text})).driver == "580.95.05"


def test_this_machine(case, machine):
    from deepseek_optimizer.doctor import Machine

    actual = examine_symptom(case(machine=Machine.here()), "cuda-error")
    assert {f.check for f in actual} == {"versions", "cuda-error"}
