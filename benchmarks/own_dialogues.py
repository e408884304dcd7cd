"""Dialogues that a chat model writes itself, both sides, for distillation and for evaluation on text like its answers:

    python -m benchmarks.own_dialogues MODEL OUT.jsonl --count 400

The user's turn is sampled first, after one of a few words, then the answer to it (as Magpie, Xu et al. 2024). Other seeds give
other dialogues. With `--temperature 0`, answers are the most likely text, as in greedy decoding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_optimizer import SamplingParams, load_model, load_tokenizer, make_engine
from deepseek_optimizer.engine.request import Request

TOPICS = (
    "", "How", "What", "Why", "Can you", "Write", "Explain", "I have", "Give me", "Please", "In Python", "My", "Is it",
    "Help me", "Summarize", "Tell me", "When", "Which", "Compare", "Who",
)  # fmt: skip
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MARK = "@@user@@"
_AT_ONCE = 3  # seeds: the last answers of a batch take long


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the answers")
    parser.add_argument("--unfinished", action="store_true", help="also dialogues whose answer was cut off after 400 tokens")
    parser.add_argument("--precision", default="int8")
    a = parser.parse_args()
    model, tokenizer = load_model(a.model, precision=a.precision), load_tokenizer(a.model)
    with a.out.open("w", encoding="utf-8") as file:
        for chat in dialogues(model, tokenizer, a.count, a.seed, a.temperature, a.unfinished):
            file.write(json.dumps({"messages": chat}) + "\n")
            file.flush()


def dialogues(
    model: Any, tokenizer: Any, count: int, seed: int, temperature: float = 0.7, unfinished: bool = False
) -> Iterator[list[dict[str, str]]]:
    """Up to `count` dialogues of one question and one answer, as messages; those that the model does not finish are left out.

    Args:
        model, tokenizer: an optimized chat model.
        seed: of the first dialogues; every further twenty have the next seed.
        temperature: of the answers.
        unfinished: whether to keep dialogues whose answer was cut off.
    """
    engine = make_engine(model, tokenizer)
    before = _before_question(tokenizer)
    known: set[str] = set()
    numbers = range(seed, seed + -(-count // len(TOPICS)))
    for at_once in (numbers[n : n + _AT_ONCE] for n in range(0, len(numbers), _AT_ONCE)):
        wanted = [(number, topic) for number in at_once for topic in TOPICS]
        asked = engine.generate([
            Request(tokenizer(before + topic)["input_ids"], SamplingParams(max_tokens=60, seed=number))
            for number, topic in wanted
        ])  # fmt: skip
        questions = {
            (topic + answer.text).strip(): number
            for (number, topic), answer in zip(reversed(wanted), reversed(asked), strict=True)
            if answer.finish == "stop"
        }
        new = sorted((n, q) for q, n in questions.items() if q not in known and len(q.split()) > 2)
        known |= questions.keys()
        chats = [[{"role": "user", "content": question}] for _, question in new]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        answers = engine.generate([
            Request(
                tokenizer(prompt)["input_ids"],
                SamplingParams(max_tokens=400, temperature=temperature, top_p=0.95, seed=number),
            )
            for (number, _), prompt in zip(new, prompts, strict=True)
        ])  # fmt: skip
        for chat, answer in zip(chats, answers, strict=True):
            if answer.finish == "stop" or unfinished:
                yield [*chat, {"role": "assistant", "content": answer.text.strip()}]


def _before_question(tokenizer: Any) -> str:
    """A dialogue in the chat template up to where the user's text begins."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(MARK)[0]


if __name__ == "__main__":
    main()
