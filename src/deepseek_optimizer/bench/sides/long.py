"""A side that measures one attention mode on long texts:

    python -m deepseek_optimizer.bench.sides.long MODEL --config '{"attention_optimization": "sparse"}' --lengths 4096,8192 ...

Prints each line of JSON as soon as it is available, so that results survive a later failure:

    {"backend", "threads", "load_s"}                       when the model is loaded
    {"length", "task", "score", "run", "answer"}           for each sample; run: as `bench.runs.Run`
    {"length", "memory_bytes"}                             when a length is done: peak above the loaded model
    {"length", "error"}                                    instead of that
    {"error"}                                              the model cannot be loaded in this mode
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ...errors import DeepSeekOptimizerError
from ..long.generate import ids_of, make_sample
from ..long.sample import Sample, score
from ..peak_memory import PeakMemory
from ..work import numbers

NEW = 64  # tokens of an answer, included in the length


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--config", type=json.loads, default={}, help="fields of DeepSeekConfig, as JSON")
    parser.add_argument("--lengths", type=numbers, required=True, help="tokens of prompt and answer")
    parser.add_argument("--tasks", type=lambda text: text.split(","), required=True)
    parser.add_argument("--samples", type=int, required=True, help="of each task and length")
    parser.add_argument("--seed", type=int, default=0)
    for line in measure(parser.parse_args()):
        print(json.dumps(line), flush=True)


def measure(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from ...integration.bind.context_extension import room_of
    from ...optimized_model import load_tokenizer
    from ..text_model import load_text_model

    started = time.perf_counter()
    try:
        tokenizer, model = load_tokenizer(a.model), load_text_model(a.model, **a.config)
    except DeepSeekOptimizerError as error:
        yield {"error": str(error)}
        return
    report = model.report()
    yield {
        "backend": f"{report.backend} ({report.detail})",
        "threads": report.threads,
        "load_s": time.perf_counter() - started,
    }
    _answer(model, tokenizer, list(range(10, 26)))  # makes mapped weights resident
    memory = PeakMemory()
    room = room_of(model.config.get_text_config())
    for length in a.lengths:
        if room is not None and length > room:
            yield {"length": length, "error": f"beyond the model's context of {room:,} tokens; see --context-extension"}
            continue
        memory.restart()
        try:
            for task in a.tasks:
                for number in range(a.samples):
                    depth = (number + 0.5) / a.samples
                    sample = make_sample(task, tokenizer, length - NEW, seed=a.seed + number, depth=depth)
                    yield {"length": length, "task": task, **_scored(model, tokenizer, sample)}
            yield {"length": length, "memory_bytes": memory.bytes()}
        except (DeepSeekOptimizerError, MemoryError) as error:
            yield {"length": length, "error": str(error) or type(error).__name__}


def _scored(model: Any, tokenizer: Any, sample: Sample) -> dict[str, Any]:
    run, ids = _answer(model, tokenizer, ids_of(tokenizer, sample.prompt))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"score": score(sample.answers, text), "run": asdict(run), "answer": text}


def _answer(model: Any, tokenizer: Any, prompt: list[int]) -> tuple[Any, list[int]]:
    """The times of `NEW` tokens, and the ids up to the end of the text: the number of timed tokens does not depend on the
    answer."""
    import torch

    from ..runs import exact_length, timed

    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    ends.add(tokenizer.eos_token_id)
    with exact_length(model):
        run, new = timed(
            model, torch.tensor([prompt], dtype=torch.int64, device="cpu"), max_new_tokens=NEW, do_sample=False, num_beams=1
        )
    ids = new[0].tolist()
    return run, ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


if __name__ == "__main__":
    main()
