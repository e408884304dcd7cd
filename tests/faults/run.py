"""Runs operations with injected faults and prints the outcomes as JSON; start it with the shim in LD_PRELOAD.

python run.py MODEL FOLDER [--seed N] [OPERATION[:MAX] ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from native_memory import STAGES, memory_trials  # noqa: E402
from operations import operations  # noqa: E402

from support.fault_points import trials  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(arguments.folder / "cache")
    known = operations(arguments.model)
    result = {}
    for number, given in enumerate(arguments.names or [*known, *STAGES]):
        name, _, max_calls = given.partition(":")
        started = time.monotonic()
        folder, limit = arguments.folder / str(number), int(max_calls) if max_calls else None
        if name in STAGES:
            result[name] = memory_trials(folder, arguments.model, name, limit, arguments.seed)
        else:
            result[name] = trials(folder, known[name], limit, arguments.seed)
        result[name]["seconds"] = round(time.monotonic() - started, 1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
