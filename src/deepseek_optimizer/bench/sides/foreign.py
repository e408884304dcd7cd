"""Shared by sides that run in an engine's own environment. Imports only the standard library."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def main(measure: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Parses the options common to all sides, and prints the result of `measure` on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    for name, value in (("prompt", 512), ("new", 64), ("depth", 0), ("batch", 1), ("repeats", 3), ("warmup", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    print(json.dumps(measure(parser.parse_args())), flush=True)


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes (VmRSS: current, VmHWM: peak)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
