"""A side of the demo: answers a question, then a longer one to measure speed.

    python -m deepseek_optimizer.bench.sides.answer transformers MODEL --tokenizer DIR
    python -m deepseek_optimizer.bench.sides.answer optimized MODEL --tokenizer DIR --precision int4

Both go through `model.generate` with the same prompts. Prints the results as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .load import SIDES, load_side

QUESTION = "What is the capital of France?"
ESSAY = "Explain how a steam engine works."  # its answer is long enough to measure speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reference", type=Path, help="JSON list of token ids: count how many the model would have chosen.")
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Results of one side: seconds, tokens/s, bytes, and the answer."""
    from transformers import AutoTokenizer

    from ...chat.conversation import prompt_ids
    from ..generate_answer import answer

    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    question, essay = (prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in (QUESTION, ESSAY))
    # Calibration would dominate the time and the memory of loading.
    config = {"precision": a.precision, "calibration": None} if a.precision else {}
    side = load_side(a.side, a.model, threads=a.threads, config=config)
    model = side.model

    greedy: dict[str, Any] = {"do_sample": False}
    reply = answer(model, tokenizer, question, lambda _piece: None, **greedy)
    model.generation_config.eos_token_id = None  # every side generates the same number of tokens
    runs = [answer(model, tokenizer, essay, lambda _piece: None, max_new_tokens=a.tokens, **greedy) for _ in range(2)]
    result = {
        "load_s": side.load_s,
        "first_token_s": reply.first_token_s,
        "tokens_per_s": max(run.tokens_per_s for run in runs),
        "memory_bytes": side.memory.bytes(),
        "answer": reply.text,
        "ids": runs[-1].ids,
    }
    if a.reference:
        result["agreed"] = _agreed(model, essay, json.loads(a.reference.read_text(encoding="utf-8")))
    return result


def _agreed(model: Any, prompt: Any, reference: list[int]) -> int:
    """Number of the reference's tokens that this model would choose, each given the reference's text before it."""
    import torch

    expected = torch.tensor([reference], dtype=torch.int64, device="cpu")
    with torch.inference_mode():
        logits = model(torch.cat([prompt, expected], dim=1)).logits
    return int((logits[0, prompt.shape[1] - 1 : -1].argmax(-1) == expected[0]).sum())


if __name__ == "__main__":
    main()
