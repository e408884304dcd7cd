"""Runs a command while another process keeps one core busy: python -m benchmarks.neighbor COMMAND..."""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    neighbor = subprocess.Popen([sys.executable, "-c", code])
    try:
        raise SystemExit(subprocess.run(sys.argv[1:]).returncode)
    finally:
        neighbor.kill()
        neighbor.wait()


if __name__ == "__main__":
    main()
