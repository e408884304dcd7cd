"""CUDA errors: driver, torch's build and the card against each other, then a first product on the card.

Minimum drivers: NVIDIA, "CUDA Compatibility", minor version compatibility: any 12.x build runs from 525.60.13 on, any 13.x
build from 580.65.06 on.
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
    """A card, and what happened when it was asked for a small product: "" if that was right."""

    name: str
    capability: tuple[int, int]
    failure: str = ""


@dataclass(frozen=True)
class Cuda:
    """What is installed. `build`: the CUDA that torch was built for; `driver`: of the kernel module; None where there is none.
    `kernels`: what torch has machine code for ("sm_90"), or code to translate ("compute_90")."""

    torch: str
    build: str | None
    driver: str | None
    devices: tuple[Device, ...] = ()
    kernels: tuple[str, ...] = ()
    failure: str = ""


def measure(case: Case) -> Iterator[Finding]:
    """Judges this machine."""
    yield from judge(look(case.machine), case.machine)


def look(machine: Machine) -> Cuda:
    """What there is here. Asks the driver only where torch can."""
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
            failure = "a product of ones came out wrong"
    except RuntimeError as error:
        failure = str(error)
    return Device(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), failure)


def judge(cuda: Cuda, machine: Machine) -> Iterator[Finding]:
    """What is wrong with it; facts in, findings out."""
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
            NAME, "warning", f"LD_LIBRARY_PATH names {', '.join(shadowed)}",
            "torch brings CUDA's libraries of its own version; others found first may not fit (undefined symbols, errors of "
            "cuBLAS or cuDNN)", "take these folders out of LD_LIBRARY_PATH", facts,
        )  # fmt: skip
    if cuda.build is None and cuda.driver is None:
        yield Finding(NAME, "ok", "nothing here uses CUDA: no driver, and torch is a build for CPUs", facts=facts)
    elif cuda.build is None:
        yield error(
            f"there is an NVIDIA driver ({cuda.driver}), but torch {cuda.torch} is a build for CPUs",
            "it came from an index of CPU builds",
            "pip install torch from PyPI, or from https://download.pytorch.org/whl/cu128",
        )
    elif cuda.driver is None and not cuda.devices:
        yield error(
            f"torch is built for CUDA {cuda.build}, but there is no NVIDIA driver",
            cuda.failure or "the kernel module isn't loaded, or the container was started without the card",
            "install the driver; start containers with --gpus all; or use the CPU, which needs neither",
        )
    elif _too_old(cuda):
        least = ".".join(map(str, MINIMUM_DRIVER[int(str(cuda.build).split(".")[0])]))
        yield error(
            f"the driver {cuda.driver} is too old for CUDA {cuda.build}",
            f"torch's build needs {least} or newer",
            f"update the driver to {least} or newer, or install a torch built for an older CUDA",
        )
    elif visible is not None and not cuda.devices:
        yield error(
            f"CUDA_VISIBLE_DEVICES={visible!r} hides every card",
            "torch sees only the cards it lists",
            "unset CUDA_VISIBLE_DEVICES, or name cards that exist (nvidia-smi -L)",
        )
    elif not cuda.devices:
        yield error("torch finds no card", cuda.failure or "the driver names none", "nvidia-smi must list the card first")
    else:
        yield from _devices(cuda, facts)


def _devices(cuda: Cuda, facts: dict[str, object]) -> Iterator[Finding]:
    fine = True
    for device in cuda.devices:
        major, minor = device.capability
        if not _has_code(device, cuda.kernels):
            fine = False
            yield Finding(
                NAME, "error", f"torch {cuda.torch} has no machine code for {device.name} (sm_{major}{minor})",
                "its build leaves out cards this old or this new: 'no kernel image is available for execution on the device'",
                "install a torch whose build names it: older releases for older cards, the newest CUDA for newer ones", facts,
            )  # fmt: skip
        elif device.failure:
            fine = False
            memory = "out of memory" in device.failure.lower()
            yield Finding(
                NAME, "error", f"{device.name} fails at a small product: {device.failure.splitlines()[0]}",
                "the card's memory is full" if memory else "driver, card or CUDA's libraries are in a bad state",
                "end the processes that nvidia-smi lists" if memory else
                "run it again with CUDA_LAUNCH_BLOCKING=1 to see where; `dmesg | grep -i xid` names faults of the card", facts,
            )  # fmt: skip
    if fine:
        names = ", ".join(d.name for d in cuda.devices)
        yield Finding(NAME, "ok", f"CUDA {cuda.build}, driver {cuda.driver or 'unknown'}: {names} computes", facts=facts)


def _too_old(cuda: Cuda) -> bool:
    least = MINIMUM_DRIVER.get(int(str(cuda.build).split(".")[0]))
    return bool(least and cuda.driver and tuple(int(p) for p in cuda.driver.split(".")) < least)


def _has_code(device: Device, kernels: tuple[str, ...]) -> bool:
    """Machine code runs on later cards of the same major version, code to translate ("compute_") on all later cards."""
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
