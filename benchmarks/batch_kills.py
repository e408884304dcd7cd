"""A batch job of 10,000 requests that is killed five times: each request has one answer, and the output has the bytes of an
unkilled job's. Bar of issue 22.

    python -m benchmarks.batch_kills MODEL [--requests 10000] [--kills 5] [--threads N]

Short answers, so that a small model takes minutes. Each kill is a SIGKILL at a random moment after a part of the job is done.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .verdict import MISSED, REACHED

_LOOK = 0.01  # seconds between looks at the partial file
_AFTER = 0.3  # a kill comes at most so many seconds after its part of the job is done: also while results are being written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    rng = random.Random(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in _requests(a.requests, rng)), encoding="utf-8")
        outputs = [Path(folder) / name for name in ("whole.jsonl", "killed.jsonl")]
        commands = [_command(a.model, source, output, a.threads) for output in outputs]
        began = time.monotonic()
        subprocess.run(commands[0], check=False, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        kills = _run_and_kill(commands[1], outputs[1], a.requests, a.kills, rng)
        result = _compare(source, *outputs)
    result |= {"requests": a.requests, "kills": kills, "seconds_without_kills": round(seconds, 1)}
    reached = result["same_bytes"] and result["each_once"] and len(kills) == a.kills
    print(json.dumps({**result, "verdict": REACHED if reached else MISSED}))
    raise SystemExit(not reached)


def _requests(count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Chats and completions, greedy and sampled, some with a common beginning, some with several answers."""
    for number in range(count):
        body: dict[str, Any] = {"max_tokens": rng.randint(1, 6), "temperature": rng.choice([0, 0.7, 1.3])}
        if number % 10 == 9:
            body["n"] = 2
        text = " ".join(rng.choices(["red", "green", "blue", "one", "two", "three"], k=rng.randint(1, 12)))
        if number % 3:
            url, body = "/v1/completions", {**body, "prompt": text}
        else:
            messages = [{"role": "system", "content": "Continue the list."}, {"role": "user", "content": text}]
            url, body = "/v1/chat/completions", {**body, "messages": messages}
        yield {"custom_id": f"request {number}", "method": "POST", "url": url, "body": body}


def _command(model: str, source: Path, output: Path, threads: int | None) -> list[str]:
    options = [] if threads is None else ["--threads", str(threads)]
    return [sys.executable, "-m", "deepseek_optimizer", "batch", model, str(source), str(output), *options]


def _run_and_kill(command: list[str], output: Path, requests: int, kills: int, rng: random.Random) -> list[int]:
    """Runs a job to its end; returns the number of answers in the partial file at each kill."""
    partial = output.with_name(output.name + ".partial")
    killed: list[int] = []
    marks = sorted(rng.sample(range(requests // 50, requests * 19 // 20), kills))
    while not output.exists():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            time.sleep(_LOOK)
            if len(killed) < kills and _lines(partial) >= marks[len(killed)]:
                time.sleep(rng.random() * _AFTER)
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed.append(_lines(partial))
        errors = process.stderr.read() if process.stderr is not None else ""
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the job ended with status {process.returncode}: {errors}")
    return killed


def _lines(partial: Path) -> int:
    """Number of answers in a partial file; its first line names the job."""
    try:
        return max(0, partial.read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0


def _compare(source: Path, whole: Path, killed: Path) -> dict[str, Any]:
    asked = [json.loads(line)["custom_id"] for line in source.read_bytes().splitlines()]
    answers = [json.loads(line) for line in killed.read_bytes().splitlines()]
    return {
        "same_bytes": whole.read_bytes() == killed.read_bytes(),
        "each_once": [answer["custom_id"] for answer in answers] == asked,
        "errors": sum(answer["response"]["status_code"] != 200 for answer in answers),
        "bytes": killed.stat().st_size,
    }


if __name__ == "__main__":
    main()
