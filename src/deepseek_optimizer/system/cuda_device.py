"""Whether torch can use a CUDA device, and if not, why."""

from __future__ import annotations

_CHECK = "`dso doctor --symptom cuda-error` examines it"


def why_no_cuda() -> str | None:
    """Why torch has no CUDA device, with the remedy; None: it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build for the CPU: install a build for CUDA (pip install torch, without an index "
            "of CPU builds), or keep the model on the CPU"
        )
    try:
        torch.cuda.init()
        found = "no device"
    except (RuntimeError, AssertionError) as error:
        found = " ".join(str(error).split())
    if "too old" in found:
        return (
            f"NVIDIA's driver is too old for torch {torch.__version__}, which is built for CUDA {torch.version.cuda}: update "
            f"the driver, or install a torch built for an older CUDA; {_CHECK}"
        )
    return (
        "torch finds no CUDA device: install NVIDIA's driver, start a container with --gpus all, or keep the model on the CPU; "
        f"{_CHECK} ({found})"
    )
