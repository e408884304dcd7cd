"""What a machine without compiler or CUDA downloads and computes from nothing to a first answer.

    python -m benchmarks.clean_install [build/wheels/*.whl] [--pip-option=--find-links=DIRECTORY]

Downloads go to an empty folder first, so that what follows is work: a virtual environment, the installation from that folder,
and an answer of SmolLM2-135M-Instruct, whose processor time is reported. PATH has no compiler. torch is the build for CPUs,
from PyTorch's own index unless an option names another place.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.hardware import cpu_name

TORCH_INDEX = "--extra-index-url=https://download.pytorch.org/whl/cpu"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def measured(command: list[str], environment: dict[str, str]) -> tuple[dict[str, float], str]:
    """Wall-clock and processor time of a command, and its output."""
    start, before = time.monotonic(), os.times()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - start, "processor_seconds": used}, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="default: that of build/wheels")
    parser.add_argument("--pip-option", action="append", help=f"of the downloads; default: {TORCH_INDEX}")
    parser.add_argument("--torch", default="torch", help="requirement, such as torch==2.13.0+cpu where PyPI is an index, too")
    a = parser.parse_args()
    wheel = (a.wheel or next(Path("build/wheels").glob("*.whl"))).resolve()
    model = smollm2.fetch()
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PATH": f"{folder}/env/bin", "PIP_NO_CACHE_DIR": "1", "CXX": "false", "CC": "false"}
        downloads, python = Path(folder) / "downloads", f"{folder}/env/bin/python"
        steps = {}
        steps["environment"], _ = measured([sys.executable, "-m", "venv", f"{folder}/env"], environment)
        pip = [python, "-m", "pip", "--quiet"]
        get = [*pip, "download", "--dest", str(downloads), *(a.pip_option or [TORCH_INDEX]), a.torch, str(wheel)]
        steps["downloads"], _ = measured(get, environment)
        install = [*pip, "install", "--no-index", "--find-links", str(downloads), a.torch, str(wheel)]
        steps["installation"], _ = measured(install, environment)
        run = [f"{folder}/env/bin/dso", "run", str(model), QUESTION, "--temperature", "0", "--json"]
        steps["answer"], reply = measured(run, environment)
        sizes = {p.name: p.stat().st_size for p in (*downloads.iterdir(), model)}
    work = sum(step["processor_seconds"] for name, step in steps.items() if name != "downloads")
    print(
        json.dumps(
            {"cpu": cpu_name(), "wheel": wheel.name, "steps": steps, "downloads_mb": sum(sizes.values()) / 1e6}, indent=1
        )
    )
    print(f"{sum(sizes.values()) / 1e6:.0f} MB of downloads, {work:.0f} s of processor time beside them")
    answer = json.loads(reply)["text"]
    print(f"{QUESTION} {answer}")
    return 0 if ANSWER in answer else 1


if __name__ == "__main__":
    sys.exit(main())
