"""Transformers in bf16 against the optimised model, the same work on the same machine, sides in turns: `make bench`.

    python benchmarks/spine.py [smol] [r1q15] [--rounds 3] [--out benchmarks/results/spine.json]

smol: SmolLM2-135M-Instruct (real weights, from a package registry). r1q15: the shape of R1-Distill-Qwen-1.5B with random
weights, made here; right for speed, meaningless as text. A figure is the median over rounds; a ratio is the median of the
rounds' own ratios, with the lowest and the highest beside it. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench import smollm2
from deepseek_optimizer.bench.against import alternate, ratio_rows
from deepseek_optimizer.bench.peers.base import arguments
from deepseek_optimizer.bench.plain import dequantised
from deepseek_optimizer.bench.process import cpu_name, usable_cpus
from deepseek_optimizer.bench.sections import number
from deepseek_optimizer.bench.work import Work
from deepseek_optimizer.versions import versions

FIGURES = ("prefill_tok_s", "decode_tok_s", "to_first_token_s", "memory_bytes")


def r1q15() -> Path:
    """R1-Distill-Qwen-1.5B's shape in bf16, weights ~ N(0, 0.02); saved once beside SmolLM2."""
    target = smollm2.cache_directory() / "r1q15"
    if not (target / "config.json").exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
            vocab_size=151936, max_position_embeddings=131072, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(1) if "norm" in name else p.zero_() if name.endswith("bias") else p.normal_(0, 0.02)
        model.save_pretrained(target)
    return target


def packed(source: Path, precision: str) -> Path:
    """The packed checkpoint of `source`, made once beside it by the command a user would type."""
    target = source.with_name(f"{source.name}-{precision}")
    if not target.exists():
        subprocess.run(
            [sys.executable, "-m", "deepseek_optimizer", "convert", source, target, "--precision", precision], check=True
        )
    return target


def compare(name: str, theirs: Path, ours: dict[str, Path], work: Work, rounds: int, *options: str) -> list[dict[str, Any]]:
    """One row a figure and an optimised side. ours: label -> model."""
    common = [*arguments(work, threads=usable_cpus(), repeats=3, warmup=1), *options]
    module = [sys.executable, "-m", "deepseek_optimizer.bench.sides.model"]
    sides = {"transformers": [*module, "transformers", str(theirs), *common]}
    sides.update({label: [*module, "optimised", str(model), *common] for label, model in ours.items()})
    found = alternate(sides, rounds, lambda text: print(f"{name}: {text}", file=sys.stderr))
    return [{"work": name, **row} for row in ratio_rows(found, "transformers", FIGURES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="*", default=["smol", "r1q15"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if "smol" in a.work:
        gguf = smollm2.fetch()
        bf16 = dequantised(gguf)
        ours = {"q4_1 (lossless)": gguf, **{p: packed(bf16, p) for p in ("int4", "int8", "bf16")}}
        rows += compare("SmolLM2-135M, 512 in", bf16, ours, Work(512, 33), a.rounds)
    if "r1q15" in a.work:
        bf16 = r1q15()
        ours, work = {"int4": packed(bf16, "int4")}, Work(512, 17)
        rows += compare("R1-Distill-Qwen-1.5B shape, 512 in", bf16, ours, work, a.rounds)
        rows += compare("R1-Distill-Qwen-1.5B shape, warm start", bf16, ours, work, a.rounds, "--repeats", "0")
        rows += compare("R1-Distill-Qwen-1.5B shape, cold start", bf16, ours, work, a.rounds, "--repeats", "0", "--cold")
    report = {"cpu": cpu_name(), "threads": usable_cpus(), "versions": versions(), "rounds": a.rounds, "rows": rows}
    print(
        f"{report['cpu']}, {report['threads']} threads; better: how many times, median (lowest - highest) of {a.rounds} rounds"
    )
    for r in rows:
        print(
            f"{r['work']:40} {r['name']:16} {r['figure']:17} {number(r['baseline'], r['unit']):>14} -> "
            f"{number(r['side'], r['unit']):>14} {r['better']:6.2f}x ({r['lowest']:.2f} - {r['highest']:.2f})"
        )
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
