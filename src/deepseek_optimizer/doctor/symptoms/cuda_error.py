"""CUDA errors: whether the driver, torch's build and the GPU are compatible, and whether the GPU computes a matrix product.

Minimum drivers: NVIDIA, "CUDA Compatibility", minor version compatibility: any 12.x build needs 525.60.13 or newer, any 13.x
build 580.65.06 or newer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..case import Case
from ..finding import Finding
from ..machine import Machine
from .base import Symptom

NAME = "cuda-error"
MINIMUM_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}  # by the major version of CUDA


@dataclass(frozen=True)
class Device:
    """A GPU. failure: the error of a small matrix product on it; "" if the result was right."""

    name: str
    capability: tuple[int, int]
    failure: str = ""


@dataclass(frozen=True)
class Cuda:
    """What is installed. build: CUDA version that torch was built for. driver: version of the kernel module; None without one.
    kernels: architectures that torch has machine code ("sm_90") or PTX ("compute_90") for."""

    torch: str
    build: str | None
    driver: str | None
    devices: tuple[Device, ...] = ()
    kernels: tuple[str, ...] = ()
    failure: str = ""


def measure(case: Case) -> Iterator[Finding]:
    """Examines this machine."""
    yield from judge(look(case.machine), case.machine)


def look(machine: Machine) -> Cuda:
    """Collects the facts. Queries the driver only if torch is built for CUDA."""
    import torch

    text = machine.read("/proc/driver/nvidia/version")
    version = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    driver = version[1] if version else None
    if torch.version.cuda is None:
        return Cuda(torch.__version__, None, driver)
    failure, devices = "", []
    try:
        torch.cuda.init()
        devices = [_device(i) for i in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch's own, for a build without CUDA
        failure = str(error)
    return Cuda(torch.__version__, torch.version.cuda, driver, tuple(devices), tuple(torch.cuda.get_arch_list()), failure)


def _device(index: int) -> Device:
    import torch

    failure = ""
    try:
        ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float32)
        if float((ones @ ones).sum()) != 64.0**3:
            failure = "a product of matrices of ones has a wrong result"
    except RuntimeError as error:
        failure = str(error)
    return Device(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), failure)


def judge(cuda: Cuda, machine: Machine) -> Iterator[Finding]:
    """The findings that follow from the facts."""
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    facts: dict[str, object] = {
        "torch": cuda.torch, "torch_cuda": cuda.build, "driver": cuda.driver, "CUDA_VISIBLE_DEVICES": visible,
        "devices": [f"{d.name} (sm_{d.capability[0]}{d.capability[1]})" for d in cuda.devices], "kernels": list(cuda.kernels),
    }  # fmt: skip

    def error(what: str, cause: str, fix: str) -> Finding:
        return Finding(NAME, "error", what, cause, fix, facts)

    shadowed = [p for p in machine.environ.get("LD_LIBRARY_PATH", "").split(":") if "cuda" in p.lower() or "cudnn" in p.lower()]
    if cuda.build and shadowed:
        yield Finding(
            NAME, "warning", f"LD_LIBRARY_PATH contains {', '.join(shadowed)}",
            "torch ships the CUDA libraries it needs; other versions found first may be incompatible (undefined symbols, "
            "cuBLAS "
            "or cuDNN errors)", "remove these folders from LD_LIBRARY_PATH", facts,
        )  # fmt: skip
    if cuda.build is None and cuda.driver is None:
        yield Finding(NAME, "ok", "CUDA is not used: there is no driver, and torch is a CPU build", facts=facts)
    elif cuda.build is None:
        yield error(
            f"there is an NVIDIA driver ({cuda.driver}), but torch {cuda.torch} is a CPU build",
            "it was installed from an index of CPU builds",
            "pip install torch from PyPI, or from https://download.pytorch.org/whl/cu128",
        )
    elif cuda.driver is None and not cuda.devices:
        yield error(
            f"torch is built for CUDA {cuda.build}, but there is no NVIDIA driver",
            cuda.failure or "the kernel module is not loaded, or the container was started without the GPU",
            "install the driver, start containers with --gpus all, or use the CPU",
        )
    elif _too_old(cuda):
        minimum = ".".join(map(str, MINIMUM_DRIVER[int(str(cuda.build).split(".")[0])]))
        yield error(
            f"the driver {cuda.driver} is too old for CUDA {cuda.build}",
            f"this torch build needs {minimum} or newer",
            f"update the driver to {minimum} or newer, or install a torch built for an older CUDA",
        )
    elif visible is not None and not cuda.devices:
        yield error(
            f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU",
            "torch sees only the GPUs it lists",
            "unset CUDA_VISIBLE_DEVICES, or list GPUs that exist (nvidia-smi -L)",
        )
    elif not cuda.devices:
        yield error("torch finds no GPU", cuda.failure or "the driver reports none", "check that nvidia-smi lists the GPU")
    else:
        yield from _devices(cuda, facts)


def _devices(cuda: Cuda, facts: dict[str, object]) -> Iterator[Finding]:
    all_work = True
    for device in cuda.devices:
        major, minor = device.capability
        if not _has_code(device, cuda.kernels):
            all_work = False
            yield Finding(
                NAME, "error", f"torch {cuda.torch} has no machine code for {device.name} (sm_{major}{minor})",
                "this build does not support GPUs this old or this new: 'no kernel image is available for execution on the "
                "device'",
                "install a torch build that supports it: an older release for an older GPU, the newest CUDA for a newer "
                "one", facts,
            )  # fmt: skip
        elif device.failure:
            all_work = False
            memory = "out of memory" in device.failure.lower()
            yield Finding(
                NAME, "error", f"{device.name} fails at a small matrix product: {device.failure.splitlines()[0]}",
                "the GPU's memory is full" if memory else "the driver, the GPU or the CUDA libraries are in a bad state",
                "end the processes that nvidia-smi lists" if memory else
                "run it again with CUDA_LAUNCH_BLOCKING=1 to locate the error; `dmesg | grep -i xid` shows hardware faults",
                facts,
            )  # fmt: skip
    if all_work:
        names = ", ".join(d.name for d in cuda.devices)
        yield Finding(NAME, "ok", f"CUDA {cuda.build}, driver {cuda.driver or 'unknown'}: {names} computes", facts=facts)


def _too_old(cuda: Cuda) -> bool:
    minimum = MINIMUM_DRIVER.get(int(str(cuda.build).split(".")[0]))
    return bool(minimum and cuda.driver and tuple(int(p) for p in cuda.driver.split(".")) < minimum)


def _has_code(device: Device, kernels: tuple[str, ...]) -> bool:
    """Whether torch has code for it: machine code runs on later GPUs of the same major version, PTX on all later GPUs."""
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        built = (int(digits[0][:-1]), int(digits[0][-1]))
        if built <= device.capability and (kind == "compute" or built[0] == device.capability[0]):
            return True
    return not kernels


SYMPTOM = Symptom(measure, checks=("versions",), needs_model=False, loads=False)
