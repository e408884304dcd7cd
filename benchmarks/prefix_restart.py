"""What a prefix cache in files saves after a restart: time to the first token of a known prompt, in new processes.

The prompt is processed with an empty directory, then by a second process from files, and by a third whose files have to come
from the disk (their pages are dropped first). Bar of issue 17: at most 0.1 times the time of processing the prompt.

    python -m benchmarks.prefix_restart [smol r1q15 | MODEL_DIRECTORY ...] [--form int4] [--tokens 4000] [--threads N]
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
from typing import Any

from . import models
from .prompts import random_prompts
from .verdict import MISSED, REACHED

BAR = 0.1  # times the time of processing the prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smol", "r1q15"])
    parser.add_argument("--form", default="int4", help="of a named model: bf16, int4, ...")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--side", metavar="DIRECTORY", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(_side(Path(a.models[0]), Path(a.side), a.tokens, a.threads)))
        return
    for name in a.models:
        path = models.model(name, a.form) if name in models.TITLES else Path(name)
        print(json.dumps({"model": name, **_measure(path, a.tokens, a.threads)}), flush=True)


def _measure(path: Path, tokens: int, threads: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as directory:
        cold, warm = (_run(path, directory, tokens, threads) for _ in range(2))
        size = _drop_pages(Path(directory))
        from_disk = _run(path, directory, tokens, threads)
    ratio = warm["first_token_s"] / cold["first_token_s"]
    return {
        "prompt_tokens": tokens,
        "processed_s": cold["first_token_s"],
        "from_files_s": warm["first_token_s"],
        "from_disk_s": from_disk["first_token_s"],
        "cached_tokens": warm["cached_tokens"],
        "file_bytes": size,
        "startup_s": [cold["startup_s"], warm["startup_s"]],
        "write_s": cold["close_s"],
        "same_token": cold["token"] == warm["token"] == from_disk["token"],
        "ratio": ratio,
        "verdict": REACHED if ratio <= BAR else MISSED,
    }


def _run(path: Path, directory: str, tokens: int, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prefix_restart", str(path), "--side", directory, "--tokens", str(tokens)]
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _drop_pages(directory: Path) -> int:
    """Asks the system to forget the files' pages; returns their bytes."""
    size = 0
    for path in directory.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size


def _side(path: Path, directory: Path, tokens: int, threads: int | None) -> dict[str, Any]:
    """One process: another prompt first, so that only the known one's own time is measured."""
    from deepseek_optimizer import load_model
    from deepseek_optimizer.engine.request import SamplingParams
    from deepseek_optimizer.serving import make_engine

    began = time.perf_counter()
    fields: dict[str, Any] = {} if threads is None else {"threads": threads}
    model = load_model(path, **fields)
    engine = make_engine(model, None, prefix_cache_dir=str(directory), drafts=False)
    startup = time.perf_counter() - began
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    vocab = engine.core.facts.vocab_size
    engine.generate(random_prompts(os.getpid(), 1, 300, vocab), sampling)
    [prompt] = random_prompts(1, 1, tokens, vocab)
    began = time.perf_counter()
    [answer] = engine.generate([prompt], sampling)
    first = time.perf_counter() - began
    began = time.perf_counter()
    engine.close()
    return {
        "startup_s": startup,
        "first_token_s": first,
        "close_s": time.perf_counter() - began,
        "cached_tokens": answer.cached_tokens,
        "token": answer.token_ids[0],
    }


if __name__ == "__main__":
    main()
