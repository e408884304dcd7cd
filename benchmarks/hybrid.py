"""A hybrid model of Qwen3.5-4B's shape, cut to a few layers: conversations, long contexts, and decoding beside Transformers.

    python -m benchmarks.hybrid [conversation restart depth transformers] [--layers 4] [--form int8] [--threads N]

conversation: the third turn's time to the first token, over that of a text that consists of its new tokens alone; bar 1.2.
restart: the same by another process, from the prefix cache in files.
depth: the time that a token takes in the linear layers with 32,768 tokens in the cache, over that with 512; bar 1.1. The cache
is allocated but not computed: its values do not change the time.
transformers: tokens per second in decoding, over Transformers' in bf16 and in fp32; bar 10.

Weights are random, one layer in four has attention, and the vocabulary is cut, since all layers would not fit in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.hardware import usable_cpus

from .alternating import alternate, clock_of, shown, speedup
from .prompts import random_prompts
from .verdict import MISSED, REACHED

PROMPT, ANSWER, NEW = 512, 32, 128  # tokens: the first text, each answer, each later text
TURN_BAR, DEPTH_BAR, DECODE_BAR = 1.2, 1.1, 10.0
DEPTHS = (512, 32768)
ATTENTION = ("attention", "cache_write", "rope", "head_norm_rope")  # ops of the layers with attention


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS) + "; all by default")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--form", default="int8", help="precision of the optimized model")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="keeps the models there, and uses those that are")
    parser.add_argument("--busy", action="store_true", help="measure processor time, since the machine is busy")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if unknown := sorted(set(a.parts) - PARTS.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if a.side:
        print(json.dumps(SIDES[a.side](a)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        a.directory = a.directory or Path(temporary)
        for part in a.parts or PARTS:
            print(json.dumps({"part": part, **PARTS[part](a)}), flush=True)


def _conversation(a: argparse.Namespace) -> dict[str, Any]:
    return _turns(_process(a, "conversation"))


def _restart(a: argparse.Namespace) -> dict[str, Any]:
    _process(a, "begin")
    return _turns(_process(a, "continue"))


def _turns(times: dict[str, Any]) -> dict[str, Any]:
    ratio = statistics.median(third / alone for third, alone in zip(times["third_turn"], times["alone"], strict=True))
    return {**times, "ratio": ratio, "verdict": REACHED if ratio <= TURN_BAR else MISSED}


def _conversation_side(a: argparse.Namespace) -> dict[str, Any]:
    engine = _engine(a)
    return _third_turns(a, engine, [_two_turns(a, engine, seed) for seed in range(a.rounds)])


def _begin_side(a: argparse.Namespace) -> dict[str, Any]:
    engine = _engine(a, a.directory / "prefixes")
    texts = [_two_turns(a, engine, seed) for seed in range(a.rounds)]
    engine.close()  # waits until the prefixes are written
    (a.directory / "texts.json").write_text(json.dumps(texts))
    return {}


def _continue_side(a: argparse.Namespace) -> dict[str, Any]:
    engine = _engine(a, a.directory / "prefixes")
    return _third_turns(a, engine, json.loads((a.directory / "texts.json").read_text()))


def _engine(a: argparse.Namespace, prefixes: Path | None = None) -> Any:
    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_engine

    model = load_model(_packed(a), threads=a.threads)
    options = {} if prefixes is None else {"prefix_cache_dir": str(prefixes)}
    engine = make_engine(model, None, drafts=False, **options)
    _first_token(engine, random_prompts(10**6, 1, 300, a.vocabulary)[0])
    return engine


def _two_turns(a: argparse.Namespace, engine: Any, seed: int) -> list[int]:
    """The tokens of two turns, answers included."""
    [text, later] = random_prompts(seed, 2, PROMPT + 13 * seed, a.vocabulary)  # the last block is full to different degrees
    for new in (text, later[:NEW]):
        text = text if new is text else [*text, *new]
        text = [*text, *_generate(engine, text, ANSWER).token_ids]
    return text


def _third_turns(a: argparse.Namespace, engine: Any, texts: list[list[int]]) -> dict[str, Any]:
    times: dict[str, list[float]] = {"third_turn": [], "alone": []}
    cached, clock = [], clock_of(a.busy)
    for seed, text in enumerate(texts):
        [new, alone] = random_prompts(10**4 + seed, 2, NEW, a.vocabulary)
        times["alone"].append(_first_token(engine, alone, clock)[0])
        seconds, reused = _first_token(engine, [*text, *new], clock)
        times["third_turn"].append(seconds)
        cached.append(reused)
    return {**times, "earlier_tokens": [len(text) for text in texts], "cached_tokens": cached}


def _first_token(engine: Any, prompt: list[int], clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
    begin = clock()
    answer = _generate(engine, prompt, 1)
    return clock() - begin, answer.cached_tokens


def _generate(engine: Any, prompt: list[int], tokens: int) -> Any:
    from deepseek_optimizer.engine.request import SamplingParams

    [answer] = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return answer


def _depth(a: argparse.Namespace) -> dict[str, Any]:
    return _process(a, "depth")


def _depth_side(a: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from deepseek_optimizer import load_model
    from deepseek_optimizer.backends.base import DECODE, StepBatch

    model = load_model(_packed(a), threads=a.threads)
    runtime = model.dso
    blocks = max(DEPTHS) // 32 + 1
    store = runtime.backend.new_store(runtime.graph, runtime.kv_dtype, blocks, 2)

    def numbers(*values: int) -> Any:
        return np.array(values, np.int32)

    def step(context: int) -> None:
        table = np.arange(blocks, dtype=np.int32)[None, : context // 32 + 1]
        batch = StepBatch(
            numbers(7), numbers(context), numbers(1), numbers(context), numbers(DECODE), table, numbers(0),
            state_from=numbers(0), state_to=np.array([[0, 1]], np.int32),
        )  # fmt: skip
        runtime.plan.run(batch, store)

    found: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    whole: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    with runtime.backend.thread_context():
        for _ in range(a.rounds + 1):
            for depth in DEPTHS:
                runtime.plan.timing()
                for _ in range(20):
                    step(depth)
                rows = runtime.plan.timings()
                found[depth].append(sum(row["seconds"] / row["runs"] for row in rows if row["op"] not in ATTENTION))
                whole[depth].append(sum(row["seconds"] / row["runs"] for row in rows))
    short, long = DEPTHS
    ratio = statistics.median(there / here for there, here in zip(found[long][1:], found[short][1:], strict=True))
    return {
        "seconds_without_attention": found, "seconds": whole, "ratio": ratio,
        "verdict": REACHED if ratio <= DEPTH_BAR else MISSED,
    }  # fmt: skip


def _transformers(a: argparse.Namespace) -> dict[str, Any]:
    return _process(a, "transformers")


def _transformers_side(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from deepseek_optimizer import load_model

    torch.set_num_threads(a.threads)
    models = {
        "ours": load_model(_packed(a), threads=a.threads),
        "bf16": AutoModelForCausalLM.from_pretrained(_original(a), dtype=torch.bfloat16).eval(),
        "fp32": AutoModelForCausalLM.from_pretrained(_original(a), dtype=torch.float32).eval(),
    }
    caches: dict[str, Any] = {}
    with torch.inference_mode():
        ids = torch.tensor(random_prompts(0, 1, 64, a.vocabulary), dtype=torch.int64)
        for name, model in models.items():
            caches[name] = model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def side(name: str) -> Any:
            def run() -> None:
                for _ in range(4):
                    models[name](ids[:, :1], past_key_values=caches[name], use_cache=True, logits_to_keep=1)

            return run

        times = alternate({name: side(name) for name in models}, a.rounds, 60.0, clock_of(a.busy))
    row: dict[str, Any] = {"times_of_4_tokens": times, "form": a.form}
    for name in ("bf16", "fp32"):
        row[name] = speedup(times, "ours", name)
        print(shown(name, row[name]), file=sys.stderr)
    return {**row, "verdict": REACHED if row["bf16"]["median"] >= DECODE_BAR else MISSED}


def _process(a: argparse.Namespace, side: str) -> dict[str, Any]:
    """What a side measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hybrid", "--side", side, "--directory", str(a.directory)]
    for name in ("layers", "vocabulary", "form", "threads", "rounds"):
        command += [f"--{name}", str(getattr(a, name))]
    command += ["--busy"] * a.busy
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _original(a: argparse.Namespace) -> Path:
    """The model in bf16; written if it is not there."""
    path = Path(a.directory) / "bf16"
    if not path.exists():
        import torch
        from transformers import Qwen3_5TextConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

        config = Qwen3_5TextConfig(
            hidden_size=2560, intermediate_size=9216, num_hidden_layers=a.layers, num_attention_heads=16,
            num_key_value_heads=4, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32,
            linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=a.vocabulary, max_position_embeddings=65536,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def _packed(a: argparse.Namespace) -> Path:
    path = Path(a.directory) / a.form
    if not path.exists():
        from deepseek_optimizer import load_model

        load_model(_original(a), precision=a.form, calibration=None).save_pretrained(path)
    return path


PARTS = {"conversation": _conversation, "restart": _restart, "depth": _depth, "transformers": _transformers}
SIDES = {
    "conversation": _conversation_side, "begin": _begin_side, "continue": _continue_side, "depth": _depth_side,
    "transformers": _transformers_side,
}  # fmt: skip


if __name__ == "__main__":
    main()
