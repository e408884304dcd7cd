"""One model with and without drafts, in turns in one process:

    python -m benchmarks.drafts MODEL --agree 0.8 0 --prompt 512 --new 129 --threads 2
    python -m benchmarks.drafts MODEL --mtp 1 2 3 --texts val_tokens.npy ...
    python -m benchmarks.drafts MODEL --mtp 2 3 --dialogues held_out.jsonl --new 256 --repeats 20

Prints one JSON object as its last line: side -> {"decode_tok_s": one a run; and what the drafts did in all runs}. With
`--agree`, drafts cost nothing and hold with that probability: the continuation is known from plain decoding just before. Every
text with drafts is checked to be the plain one. With `--dialogues`, prompts are the questions of dialogues (as
`own_dialogues.py` writes them), and answers end where the model ends them.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.runs import Run

PLAIN = "plain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--agree", type=float, nargs="*", default=[], help="probabilities that free drafts hold, 3 a round")
    parser.add_argument("--mtp", type=int, nargs="*", default=[], help="drafts a round by the MTP layers, always as many")
    parser.add_argument("--least", type=float, nargs="*", default=[], help="thresholds of certainty, with the largest of --mtp")
    parser.add_argument("--texts", type=Path, help="tokens (npy) of documents, which begin with 0; none: random tokens")
    parser.add_argument("--dialogues", type=Path, help="JSON lines with messages, of which the first is the prompt")
    for name, default in (("prompt", 512), ("new", 129), ("threads", 1), ("repeats", 2), ("warmup", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import torch

    from deepseek_optimizer.bench.runs import exact_length
    from deepseek_optimizer.bench.sides.load import load_side

    model = load_side("optimized", a.model, threads=a.threads, config={}).model
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    with exact_length(model) if a.dialogues is None else nullcontext():
        for i in range(a.warmup + a.repeats):
            _turn(model, _prompt(a, model, i, generator), a, found if i >= a.warmup else {}, seed=i)
    return {side: _summary(runs) for side, runs in found.items()}


def _prompt(a: argparse.Namespace, model: Any, i: int, generator: Any) -> Any:
    """int64 [1, prompt]."""
    import numpy as np
    import torch

    from deepseek_optimizer import load_tokenizer
    from deepseek_optimizer.bench.runs import random_ids

    if a.dialogues is not None:
        lines = a.dialogues.read_text(encoding="utf-8").splitlines()
        chat = json.loads(lines[i % len(lines)])["messages"][:1]
        template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return load_tokenizer(a.model).apply_chat_template(chat, **template)["input_ids"]
    if a.texts is None:
        return random_ids(model, 1, a.prompt, generator)
    tokens = np.load(a.texts).astype(np.int64)
    begins = [
        b for b in np.flatnonzero(tokens == 0) if not (tokens[b + 1 : b + a.prompt] == 0).any() and b + a.prompt < len(tokens)
    ]
    begin = begins[(7 * i) % len(begins)]
    return torch.from_numpy(tokens[begin : begin + a.prompt])[None]


def _turn(model: Any, ids: Any, a: argparse.Namespace, found: dict[str, Any], seed: int) -> None:
    """Plain decoding, then each way of drafting, on one prompt."""
    import torch
    from tests.support.scripted_proposer import ScriptedProposer

    from deepseek_optimizer.bench.runs import timed

    options = {"max_new_tokens": a.new, "do_sample": False, "num_beams": 1}
    run, plain = timed(model, ids, **options)
    found.setdefault(PLAIN, []).append((_speed(run), None))
    script, vocab = {0: torch.cat([ids, plain], 1)[0].tolist()}, model.config.vocab_size
    ways: dict[str, dict[str, Any]] = {
        f"{agree:.0%} hold": {"proposer": ScriptedProposer(script, agree, vocab, seed)} for agree in a.agree
    }
    if a.mtp:
        ways["MTP"] = {"use_mtp": True}
    for n in a.mtp:
        fixed = {"num_assistant_tokens": n, "num_assistant_tokens_schedule": "constant"}
        ways[f"MTP, always {n}"] = {"use_mtp": True, **fixed}
    for least in a.least:
        most = {"num_assistant_tokens": max(a.mtp, default=3), "num_assistant_tokens_schedule": "constant"}
        ways[f"MTP, certain by {least}"] = {"use_mtp": True, **most, "assistant_confidence_threshold": least}
    for side, way in ways.items():
        run, drafted = timed(model, ids, **options, **way)
        if not torch.equal(plain, drafted):
            raise SystemExit(f"{side}: the text is not that of plain decoding")
        found.setdefault(side, []).append((_speed(run), model.dso.speculation))


def _speed(run: Run) -> float:
    """Tokens a second behind the first one."""
    assert run.tpot_s is not None  # there are several
    return 1 / run.tpot_s


def _summary(runs: list[tuple[float, Any]]) -> dict[str, Any]:
    reports = [report for _, report in runs if report is not None]
    made: dict[str, Any] = {"decode_tok_s": [speed for speed, _ in runs]}
    if reports:
        drafted = sum(r.drafted for r in reports)
        positions = range(max(len(r.proposed) for r in reports))
        proposed = [sum(r.proposed[j] for r in reports) for j in positions]
        held = [sum(r.acceptance[j] * r.proposed[j] for r in reports) for j in positions]
        made |= {
            "rounds": sum(r.rounds for r in reports),
            "drafted": drafted,
            "accepted_length": sum(r.accepted_length * r.drafted for r in reports) / drafted if drafted else 1.0,
            "acceptance": [h / n if n else None for h, n in zip(held, proposed, strict=True)],
            "own_estimate": [r.speedup for r in reports],
            "chosen": reports[-1].chosen,
        }
    return made


if __name__ == "__main__":
    main()
