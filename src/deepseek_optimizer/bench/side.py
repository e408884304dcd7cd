"""One side of a comparison, in a process of its own: loads, answers, and prints its figures as the last line, in JSON.

    python -m deepseek_optimizer.bench.side transformers MODEL --tokenizer DIR
    python -m deepseek_optimizer.bench.side optimised MODEL --tokenizer DIR --precision int4

Both sides import the same modules before the clock and the memory count start, go through `model.generate` with the same
prompts, and use the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"
ESSAY = "Explain how a steam engine works."  # long enough an answer to time tokens on


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["transformers", "optimised"])
    parser.add_argument("model")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reference", type=Path, help="JSON list of token ids: count how many the model would have chosen.")
    print(json.dumps(measure(parser.parse_args())))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side: seconds, tokens a second, bytes, and the answer."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  else its import would count as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import load_model
    from ..chat.conversation import answer, prompt_ids
    from .process import PeakMemory

    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    question, essay = (prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in (QUESTION, ESSAY))
    memory = PeakMemory()
    started = time.perf_counter()
    if a.side == "transformers":
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
    else:
        model = load_model(a.model, threads=a.threads, **({"precision": a.precision} if a.precision else {}))
    load_s = time.perf_counter() - started

    greedy: dict[str, Any] = {"do_sample": False}
    reply = answer(model, tokenizer, question, lambda _piece: None, **greedy)
    model.generation_config.eos_token_id = None  # the same number of tokens on every side
    runs = [answer(model, tokenizer, essay, lambda _piece: None, max_new_tokens=a.tokens, **greedy) for _ in range(2)]
    result = {
        "load_s": load_s,
        "first_token_s": reply.first_token_s,
        "tokens_per_s": max(run.tokens_per_s for run in runs),
        "memory_bytes": memory.bytes(),
        "answer": reply.text,
        "ids": runs[-1].ids,
    }
    if a.reference:
        result["agreed"] = _agreed(model, essay, json.loads(a.reference.read_text()))
    return result


def _agreed(model: Any, prompt: Any, reference: list[int]) -> int:
    """How many of the reference's tokens this model would choose, each after the reference's own text."""
    import torch

    expected = torch.tensor([reference])
    with torch.inference_mode():
        logits = model(torch.cat([prompt, expected], dim=1)).logits
    return int((logits[0, prompt.shape[1] - 1 : -1].argmax(-1) == expected[0]).sum())


if __name__ == "__main__":
    main()
