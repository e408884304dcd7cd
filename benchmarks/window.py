"""What a window of the cache costs in quality: a text of ten times the trained context is read through it, and late tokens are
compared with a fresh window that holds the same text, computed anew at each drop.

Bars of issue 5: perplexity of late tokens at most 1.05 times the fresh window's, memory constant, a pinned fact still attended:
a random string that the text repeats at its end is expected where its first mention is pinned, and is not where it was dropped.
(tiny-v3 copies nothing, however near: it has no such row.)

    python -m benchmarks.window [smol-1024 ...] [--out benchmarks/results/window.json]
"""

from __future__ import annotations

import argparse
import math
import os
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from deepseek_optimizer import load_model
from deepseek_optimizer.backends.base import BLOCK_TOKENS, PREFILL, StepBatch
from deepseek_optimizer.bench.hardware import cpu_name
from deepseek_optimizer.cache import SequenceBlocks
from deepseek_optimizer.cache.cache_window import CacheWindow
from deepseek_optimizer.calibration.text import sample_text
from deepseek_optimizer.graph.rope_rotation import key_rotation
from deepseek_optimizer.integration.memory.arena import Arena

from . import models, results
from .quality import TINY_V3
from .verdict import MISSED, REACHED

CHUNK = 256
TIMES = 10  # the window, or the trained context where that is it
MAX_RATIO, LEAST_GAIN = 1.05, 2.0  # of perplexities; nats a token that the pin is worth


@dataclass(frozen=True)
class Reading:
    """Attributes:
    model: "smol" or "tiny-v3".
    window: tokens. late: of the read windows, those at the end that are compared. copies: whether the model repeats a string.
    """

    name: str
    title: str
    model: str
    kv_cache: str
    window: int
    late: int = 5
    copies: bool = True


# tiny-v3 was trained at 1,024 tokens, whatever its config says; SmolLM2 at 8,192.
READINGS = (
    Reading("tiny-v3", "tiny-v3, 1,024 tokens (trained context)", "tiny-v3", "bf16", 1024, copies=False),
    Reading("tiny-v3-int8", "tiny-v3, 1,024 tokens, int8 cache", "tiny-v3", "int8", 1024, copies=False),
    Reading("smol-1024", "SmolLM2-135M, 1,024 tokens", "smol", "bf16", 1024),
    Reading("smol-1024-int8", "SmolLM2-135M, 1,024 tokens, int8 cache", "smol", "int8", 1024),
    Reading("smol-2048", "SmolLM2-135M, 2,048 tokens", "smol", "bf16", 2048),
    Reading("smol-8192", "SmolLM2-135M, 8,192 tokens (trained context)", "smol", "bf16", 8192, late=2),
)


class Reader:
    """One sequence over a plan; with a policy its window is kept."""

    def __init__(self, plan: Any, arena: Arena, policy: CacheWindow | None, pinned: Any = ()) -> None:
        self.plan, self.arena, self.policy, self.pinned = plan, arena, policy, tuple(pinned)
        self.tokens: list[int] = []
        self.blocks = SequenceBlocks(arena.manager)
        self.max_blocks = self.drops = 0
        self.turn_seconds: list[float] = []

    def make_room(self, coming: int) -> bool:
        """Drops what must go; says whether anything went."""
        runs = [] if self.policy is None else self.policy.drops(len(self.tokens), self.pinned, coming)
        began = time.perf_counter()
        for run in runs:
            self.arena.drop_blocks(self.blocks, run.first_block, run.count)
            del self.tokens[run.begin : run.begin + run.tokens]
            self.pinned = run.renumbered(self.pinned)
        if runs:
            self.drops += 1
            self.turn_seconds.append(time.perf_counter() - began)
        return bool(runs)

    def read(self, ids: list[int], following: list[int] | None = None) -> torch.Tensor:
        """Nats of the tokens that follow each of `ids`, [len(following)]: they are those of the last rows, none if None."""
        count, before = len(ids), len(self.tokens)
        with self.arena.locked():
            self.arena.copy_blocks(self.blocks.append(count))
        wanted = 0 if following is None else len(following)
        batch = StepBatch(
            token_ids=np.array(ids, np.int32), positions=np.arange(before, before + count, dtype=np.int32),
            query_len=np.array([count], np.int32), context_len=np.array([before], np.int32),
            phase=np.array([PREFILL], np.int32),
            block_table=self.blocks.table()[None], logit_rows=np.arange(count - wanted, count, dtype=np.int32),
        )  # fmt: skip
        logits = self.arena.run(self.plan, batch).logits
        self.tokens += ids
        self.max_blocks = max(self.max_blocks, len(self.blocks.blocks))
        if following is None:
            return torch.zeros(0)
        return torch.nn.functional.cross_entropy(logits, torch.tensor(following), reduction="none").double()

    def free(self) -> None:
        with self.arena.locked():
            self.blocks.free()


class Bench:
    """A model, a text in its tokens, and a random string that a sentence gives and another asks for."""

    def __init__(self, reading: Reading, tiny_v3: Path, quick: bool) -> None:
        self.window, self.chunk = reading.window, min(CHUNK, reading.window // 4)
        self.policy = CacheWindow(tokens=self.window)
        path = tiny_v3 if reading.model == "tiny-v3" else models.model("smol", "bf16")
        model = load_model(path, precision="bf16", kv_cache=reading.kv_cache)
        runtime, tokenizer = model.dso, AutoTokenizer.from_pretrained(path)
        self.model, self.plan = model, runtime.plan
        capacity = 3 * self.window // BLOCK_TOKENS + 8
        store = runtime.backend.new_store(runtime.graph, runtime.kv_dtype, capacity)
        self.arena = Arena(store, runtime.graph.hidden_states - 1, rotation=key_rotation(runtime.graph))
        encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        length = (3 if quick else TIMES) * self.window
        if reading.model == "tiny-v3":
            self.text = np.load(tiny_v3 / "val_tokens.npy")[:length].astype(int).tolist()
        else:
            self.text = encode(sample_text())[:length]
        if len(self.text) < length:
            raise SystemExit(f"{reading.name}: the text has {len(self.text)} tokens, and {length} are to be read")
        draw = random.Random(5)
        code = "".join(draw.choice(string.ascii_uppercase + string.digits) for _ in range(24))
        self.question, self.code = encode(" The secret code word is: "), encode(code)
        self.fact = self.question + self.code + encode(".\n\n")

    def compare(self, late: int) -> dict[str, Any]:
        """Late tokens through the window and in fresh ones of the same text."""
        reader, fresh = Reader(self.plan, self.arena, self.policy), Reader(self.plan, self.arena, None)
        begin, ours, theirs = len(self.text) - late * self.window, [], []
        for at in range(0, len(self.text) - 1, self.chunk):
            ids, following = self.text[at : at + self.chunk], self.text[at + 1 : at + self.chunk + 1]
            ids = ids[: len(following)]
            went = reader.make_room(len(ids))
            if at < begin:
                reader.read(ids)
                continue
            if went or not fresh.tokens:
                fresh.free()
                fresh = Reader(self.plan, self.arena, None)
                self._fill(fresh, reader.tokens)
            ours.append(reader.read(ids, following))
            theirs.append(fresh.read(ids, following))
        a, b = torch.cat(ours), torch.cat(theirs)
        found = {
            "read": len(self.text), "compared": len(a), "drops": reader.drops,
            "turn_seconds": float(np.median(reader.turn_seconds)),
            "max_blocks": reader.max_blocks, "window_blocks": -(-self.window // BLOCK_TOKENS),
            "cache_mb": reader.max_blocks * self.arena.store.block_bytes / 1e6,
            "perplexity": math.exp(float(a.mean())), "fresh_perplexity": math.exp(float(b.mean())),
            "perplexity_ratio": math.exp(float((a - b).mean())),
            "perplexity_ratio_error": float((a - b).std() / len(a) ** 0.5),
        }  # fmt: skip
        reader.free()
        fresh.free()
        return found

    def recall(self, pin: bool) -> tuple[float, float]:
        """Nats a token of the string at the end of the text: through the window, and in a fresh one of the same text."""
        begin = 2 * BLOCK_TOKENS
        text = self.text[:begin] + self.fact + self.text[begin:]
        reader = Reader(self.plan, self.arena, self.policy, ((begin, begin + len(self.fact)),) if pin else ())
        for at in range(0, len(text), self.chunk):
            ids = text[at : at + self.chunk]
            reader.make_room(len(ids))
            reader.read(ids)
        ask = self.question + self.code
        reader.make_room(len(ask))
        fresh = Reader(self.plan, self.arena, None)
        self._fill(fresh, reader.tokens)
        found = []
        for each in (reader, fresh):
            found.append(float(each.read(ask[:-1], self.code).mean()))
            each.free()
        return found[0], found[1]

    def _fill(self, reader: Reader, tokens: list[int]) -> None:
        for i in range(0, len(tokens), self.chunk):
            reader.read(tokens[i : i + self.chunk])


def measure(reading: Reading, tiny_v3: Path = TINY_V3, quick: bool = False) -> dict[str, Any]:
    """A row of the results. quick: three windows are read, not ten."""
    bench = Bench(reading, tiny_v3, quick)
    row = {**bench.compare(1 if quick else reading.late), "title": reading.title, "window": reading.window}
    held = [row["perplexity_ratio"] <= MAX_RATIO, row["max_blocks"] <= row["window_blocks"]]
    if reading.copies:
        row["code_tokens"] = len(bench.code)
        row["code_nats_pinned"], row["code_nats_pinned_fresh"] = bench.recall(True)
        row["code_nats_dropped"], row["code_nats_dropped_fresh"] = bench.recall(False)
        held.append(row["code_nats_dropped"] - row["code_nats_pinned"] >= LEAST_GAIN)
    return {**row, "verdict": REACHED if all(held) else MISSED}


def _shown(row: dict[str, Any]) -> str:
    shown = (
        f"{row['title']}: perplexity {row['perplexity']:.3f}, fresh {row['fresh_perplexity']:.3f}, ratio "
        f"{row['perplexity_ratio']:.4f} +- {row['perplexity_ratio_error']:.4f}; {row['max_blocks']} of {row['window_blocks']} "
        f"blocks; {row['drops']} drops of {1000 * row['turn_seconds']:.1f} ms"
    )
    if "code_nats_pinned" in row:
        shown += (
            f"; code: {row['code_nats_pinned']:.2f} nats pinned (fresh {row['code_nats_pinned_fresh']:.2f}), "
            f"{row['code_nats_dropped']:.2f} dropped (fresh {row['code_nats_dropped_fresh']:.2f})"
        )
    return f"{shown}: {row['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(r.name for r in READINGS)}; all where none is given"
    )
    parser.add_argument("--tiny-v3", type=Path, default=Path(os.environ.get("DSO_TINY_V3", TINY_V3)))
    parser.add_argument("--quick", action="store_true", help="three windows, not ten")
    parser.add_argument("--out", type=Path, help="JSON file to put the rows into")
    a = parser.parse_args()
    if unknown := set(a.names) - {r.name for r in READINGS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for reading in READINGS:
        if a.names and reading.name not in a.names:
            continue
        if reading.model == "tiny-v3" and not a.tiny_v3.exists():
            print(f"{reading.name} is left out: {a.tiny_v3} does not exist; name it with --tiny-v3")
            continue
        began = time.perf_counter()
        row = measure(reading, a.tiny_v3, a.quick)
        print(f"{_shown(row)} ({time.perf_counter() - began:.0f} s)", flush=True)
        if a.out is not None:
            entry = {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d"), **row}
            results.merge(a.out.stem, {reading.name: entry}, a.out.parent)


if __name__ == "__main__":
    main()
