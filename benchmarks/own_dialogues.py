"""Dialogues that a chat model writes itself, both sides, for distillation and for evaluation on text like its answers:

    python -m benchmarks.own_dialogues MODEL OUT.jsonl --count 400

The user's turn is sampled first, after one of a few words, then the answer to it (as Magpie, Xu et al. 2024). Other seeds give
other dialogues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_optimizer import SamplingParams, load_model, load_tokenizer, make_engine

TOPICS = (
    "", "How", "What", "Why", "Can you", "Write", "Explain", "I have", "Give me", "Please", "In Python", "My", "Is it",
    "Help me", "Summarize", "Tell me", "When", "Which", "Compare", "Who",
)  # fmt: skip
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MARK = "@@user@@"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="int8")
    a = parser.parse_args()
    model, tokenizer = load_model(a.model, precision=a.precision), load_tokenizer(a.model)
    lines = [json.dumps({"messages": chat}) + "\n" for chat in dialogues(model, tokenizer, a.count, a.seed)]
    a.out.write_text("".join(lines), encoding="utf-8")


def dialogues(model: Any, tokenizer: Any, count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Up to `count` dialogues of one question and one answer, as messages; those that the model does not finish are left out.

    Args:
        model, tokenizer: an optimized chat model.
        seed: of the first dialogues; every further twenty have the next seed.
    """
    engine = make_engine(model, tokenizer)
    begins = [_before_question(tokenizer) + topic for topic in TOPICS]
    known: set[str] = set()
    for number in range(seed, seed + -(-count // len(TOPICS))):
        asked = engine.generate(begins, SamplingParams(max_tokens=60, seed=number))
        questions = {
            (topic + answer.text).strip() for topic, answer in zip(TOPICS, asked, strict=True) if answer.finish == "stop"
        }
        new = sorted(question for question in questions - known if len(question.split()) > 2)
        known |= questions
        chats = [[{"role": "user", "content": question}] for question in new]
        prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        answers = engine.generate(prompts, SamplingParams(max_tokens=400, temperature=0.7, top_p=0.95, seed=number))
        for chat, answer in zip(chats, answers, strict=True):
            if answer.finish == "stop":
                yield [*chat, {"role": "assistant", "content": answer.text.strip()}]


def _before_question(tokenizer: Any) -> str:
    """A dialogue in the chat template up to where the user's text begins."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False)).partition(MARK)[0]


if __name__ == "__main__":
    main()
