"""Our own engine without a server, in a process of its own:

    python -m benchmarks.offline throughput MODEL --threads 2 --seed 1 [--no-drafts] [--fields '{"batch_invariant": true}']
    python -m benchmarks.offline prefill | first | edits | questions MODEL ...

Prints figures as one JSON object, its last line. Prompts follow from the seed, and so are those of `benchmarks.load`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek_optimizer.bench.statistics import percentile

from . import edits
from .prompts import PAUSE, chats, random_prompts

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--no-drafts", action="store_true")
    parser.add_argument("--fields", type=json.loads, default={}, help="of DeepSeekConfig, as JSON")
    parser.add_argument("--temperature", type=float, default=0.0, help="of questions")
    for name, default in (("threads", 1), ("seed", 0), ("prompt", 256), ("new", 128), ("batch", 16), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    print(json.dumps(MEASURES[a.what](a, _engine(a))))


def _engine(a: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from deepseek_optimizer import load_model
    from deepseek_optimizer.serving import make_engine

    model = load_model(a.model, threads=a.threads, **a.fields)
    return make_engine(model, AutoTokenizer.from_pretrained(a.model), drafts=not a.no_drafts)


def throughput(a: argparse.Namespace, engine: Any) -> Figures:
    """Tokens a second of a batch; its first run is not counted."""
    speeds = [_batch(a, engine, a.seed + run) for run in range(1 + a.repeats)]
    return {"output_tok_s": statistics.median(speeds[1:])}


def batches(a: argparse.Namespace, engine: Any) -> Figures:
    """Prints the tokens a second of a batch for each seed on a line of standard input."""
    for line in sys.stdin:
        print(_batch(a, engine, int(line)), flush=True)
    return {}


def _batch(a: argparse.Namespace, engine: Any, seed: int) -> float:
    from deepseek_optimizer.engine.request import SamplingParams

    prompts = random_prompts(seed, a.batch, a.prompt, engine.core.facts.vocab_size)
    began = time.perf_counter()
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=a.new, ignore_eos=True))
    seconds = time.perf_counter() - began
    assert all(len(answer.token_ids) == a.new for answer in answers)
    return len(prompts) * a.new / seconds


def prefill(a: argparse.Namespace, engine: Any) -> Figures:
    """Prompt tokens a second up to the first new token, one prompt at a time."""
    from deepseek_optimizer.engine.request import SamplingParams

    speeds = []
    for (prompt,) in (random_prompts(a.seed + run, 1, a.prompt, engine.core.facts.vocab_size) for run in range(1 + a.repeats)):
        began = time.perf_counter()
        engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        speeds.append(len(prompt) / (time.perf_counter() - began))
    return {"prefill_tok_s": statistics.median(speeds[1:])}


def first(a: argparse.Namespace, engine: Any) -> Figures:
    """The first token of short chats, from tokens on; the first two are not counted."""
    from deepseek_optimizer.engine.request import SamplingParams

    times = []
    for messages in chats(a.seed, 2 + a.repeats):
        prompt = _tokens(engine, messages)
        time.sleep(PAUSE)
        began = time.perf_counter()
        engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        times.append(1e3 * (time.perf_counter() - began))
    return {"ttft_ms": statistics.median(times[2:]), "ttft_p90_ms": percentile(times[2:], 90)}


def edit(a: argparse.Namespace, engine: Any) -> Figures:
    """Edits with and without drafts, and whether they are any: how many of their words stood there before."""
    given = list(edits.edits())
    found, texts = _drafted(a, engine, lambda: (messages for messages, _ in given))
    counts = [edits.kept(before, text) for (_, before), text in zip(given, texts, strict=True)]
    return {**found, "kept_words": sum(same for same, _ in counts), "words": sum(words for _, words in counts)}


def question(a: argparse.Namespace, engine: Any) -> Figures:
    return _drafted(a, engine, edits.questions)[0]


def _drafted(a: argparse.Namespace, engine: Any, chats: Callable[[], Iterator[Any]]) -> tuple[Figures, list[str]]:
    """Tokens a second behind the first one, of all chats together, one at a time, each plain and then with drafts; what became
    of the drafts; and the answers. A first round is not counted.

    Raises: SystemExit, an answer with drafts is not the plain one.
    """
    from deepseek_optimizer.engine.request import SamplingParams

    params = SamplingParams(temperature=a.temperature, top_p=0.95, max_tokens=a.new, seed=a.seed)
    counts, seconds, drafting = {False: 0, True: 0}, {False: 0.0, True: 0.0}, engine.core.drafting
    proposed = held = outputs = 0
    texts: list[str] = []
    for turn in range(1 + a.repeats):
        texts = []
        for place, messages in enumerate(chats()):
            answers = {}
            for drafts in (False, True) if (turn + place) % 2 else (True, False):
                before = drafting.proposed, drafting.accepted
                tokens, ids, steps, taken = _timed(engine, _tokens(engine, messages), replace(params), drafts)
                answers[drafts] = ids
                if turn:
                    counts[drafts], seconds[drafts] = counts[drafts] + tokens, seconds[drafts] + taken
                    proposed, held = proposed + drafting.proposed - before[0], held + drafting.accepted - before[1]
                    outputs += steps if drafts else 0
            if answers[False] != answers[True]:
                raise SystemExit(f"with drafts the text is not the plain one: {messages[-1]['content']}")
            texts.append(engine.tokenizer.decode(answers[True], skip_special_tokens=True))
    speeds = {"plain_tok_s": counts[False] / seconds[False], "drafts_tok_s": counts[True] / seconds[True]}
    return {**speeds, "proposed": proposed, "held": held, "tokens": counts[True], "steps": outputs}, texts


def _timed(engine: Any, prompt: list[int], params: Any, drafts: bool) -> tuple[int, list[int], int, float]:
    """(tokens behind the first output, all tokens, outputs behind the first, seconds behind the first)."""
    from deepseek_optimizer.engine.request import Request

    ids: list[int] = []
    times: list[float] = []
    first = 0
    for output in engine.stream(Request(prompt, params, drafts=None if drafts else False)):
        if output.token_ids:
            first = first or len(output.token_ids)
            ids += output.token_ids
            times.append(time.perf_counter())
    return len(ids) - first, ids, len(times) - 1, times[-1] - times[0]


def _tokens(engine: Any, messages: Any) -> list[int]:
    found: list[int] = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return found


MEASURES: dict[str, Callable[[argparse.Namespace, Any], Figures]] = {
    "throughput": throughput, "batches": batches, "prefill": prefill, "first": first, "edits": edit, "questions": question,
}  # fmt: skip

if __name__ == "__main__":
    main()
