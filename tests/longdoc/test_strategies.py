"""Strategies with a scripted model: their prompts, how they use the replies, and which strategy is chosen."""

from __future__ import annotations

import json
import re

import pytest

from deepseek_optimizer.errors import ConfigError, RequestError
from deepseek_optimizer.longdoc.document import Document
from deepseek_optimizer.longdoc.strategies import answer_by, choose
from deepseek_optimizer.longdoc.strategy_protocol import Reply
from deepseek_optimizer.longdoc.tasks import Extraction, Question, Summary
from support.long_documents import Scripted, material, prose

FACT = "The harbour of Lindisfarne closes at nine."
ASKED = Question("When does the harbour of Lindisfarne close?")
LONG = prose(200, seed=1) + FACT + "\n\n" + prose(200, seed=2)
SCHEMA = {
    "type": "object",
    "properties": {"places": {"type": "array", "items": {"type": "string"}}, "closes": {"type": "string"}},
    "required": ["places", "closes"],
}


@pytest.fixture(scope="module")
def long(byte_tokenizer):
    made = material(LONG, byte_tokenizer, window=512)
    yield made
    made.prompts.close()


@pytest.fixture(scope="module")
def short(byte_tokenizer):
    made = material(prose(4) + FACT, byte_tokenizer)
    yield made
    made.prompts.close()


def test_whole_shows_the_document_first_and_the_question_last(short, byte_tokenizer):
    model = Scripted(byte_tokenizer, lambda _: "At nine.")
    result = model.run(answer_by(ASKED, short))
    [prompt] = model.prompts
    assert result.strategy == "whole" and "fit" in result.reason and result.answer == "At nine."
    assert prompt.index(FACT) < prompt.index(ASKED.text) and short.document.files[0].text in prompt
    assert [FACT in c.text or c.text in FACT for c in result.citations][0]


def test_questions_on_a_whole_document_share_a_prefix(short):
    works = [answer_by(Question(words), short) for words in ("When?", "Who is the keeper?")]
    first, second = (next(work).asks[0].prompt for work in works)
    shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert shared >= len(short.ids)


def test_retrieve_shows_few_chunks_in_the_documents_order(long, byte_tokenizer):
    model = Scripted(byte_tokenizer, lambda _: "It closes at nine.")
    result = model.run(answer_by(ASKED, long))
    [prompt] = model.prompts
    assert result.strategy == "retrieve" and FACT in prompt and len(byte_tokenizer(prompt)["input_ids"]) <= 1024 - 64
    lines = [int(n) for n in re.findall(r"\[text, line (\d+)\]", prompt)]
    assert lines == sorted(lines) and 1 <= len(lines) <= 4
    assert any("nine" in c.text for c in result.citations)
    for citation in result.citations:
        assert long.document.files[0].text[citation.start : citation.end] == citation.text


def test_map_reduce_asks_every_chunk_and_merges_what_answers(long, byte_tokenizer):
    def say(prompt: str) -> str:
        if "notes above" in prompt:
            return "merged: nine"
        return f'"{FACT}"' if FACT in prompt else "NOTHING."

    model = Scripted(byte_tokenizer, say)
    result = model.run(answer_by(ASKED, long, "map_reduce"))
    assert sum(len(b.asks) for b in model.batches if "notes above" not in byte_tokenizer.decode(b.asks[0].prompt)) == len(
        long.chunks
    )
    assert all(len(ask.prompt) + ask.max_tokens <= 1024 for batch in model.batches for ask in batch.asks)
    assert all(long.text(chunk) in prompt for chunk, prompt in zip(long.chunks, model.prompts, strict=False))
    holders = {c.index for c in long.chunks if FACT in long.text(c)}
    assert result.answer == ("merged: nine" if len(holders) > 1 else f'"{FACT}"')
    assert result.citations and all(c.chunk in holders for c in result.citations)


def test_missing_answers_are_reported(long, byte_tokenizer):
    result = Scripted(byte_tokenizer, lambda _: "**Nothing**").run(answer_by(ASKED, long, "map_reduce"))
    assert "Nothing in the document" in result.answer and result.citations == []


def test_summaries_are_merged_in_levels_until_one_is_left(long, byte_tokenizer):
    count = 0

    def say(prompt: str) -> str:
        nonlocal count
        count += 1
        return f"({count})" + "x" * 40

    model = Scripted(byte_tokenizer, say)
    result = model.run(answer_by(Summary(), long))
    sizes = [len(batch.asks) for batch in model.batches]
    first = -(-len(long.chunks) // long.limits.at_once)
    levels = sizes[first:]
    assert result.strategy == "map_reduce" and result.answer == f"({count})" + "x" * 40
    assert len(levels) >= 2 and levels[-1] == 1 and all(b < a for a, b in zip(levels, levels[1:], strict=False))
    merged = "".join(model.prompts[len(long.chunks) :])
    assert all(f"({n})" in merged for n in range(1, count))  # no reply is missing
    assert model.batches[0].left > model.batches[1].left and model.batches[first - 1].left == 0


@pytest.mark.parametrize("room", [560, 1024, 3000])
@pytest.mark.parametrize("reply", [16, 64, 4000])
def test_replies_of_any_length_terminate(byte_tokenizer, room, reply):
    made = material(prose(80), byte_tokenizer, room=room, reply=reply, max_length=64, stride=8)
    model = Scripted(byte_tokenizer, lambda _: "z" * min(reply, room // 4))
    result = model.run(answer_by(Summary(), made, "map_reduce"))
    assert set(result.answer) == {"z"} and len(model.batches) < 100
    assert all(len(ask.prompt) + ask.max_tokens <= room for batch in model.batches for ask in batch.asks)
    made.prompts.close()


def test_window_pins_the_task_and_cites_visible_text(long, byte_tokenizer):
    dropped = len(long.ids) - 400
    model = Scripted(byte_tokenizer, lambda _: Reply("Something of the end.", dropped=dropped))
    result = model.run(answer_by(ASKED, long, "window"))
    [ask] = model.batches[0].asks
    assert ask.window and len(ask.prompt) > len(long.ids)
    assert ASKED.text in byte_tokenizer.decode(ask.prompt[slice(*ask.pinned[0])])
    end = byte_tokenizer.decode(ask.prompt[-200:])
    assert ASKED.text in end
    assert all(c.end > len(LONG) - 1000 for c in result.citations)


def test_extraction_uses_a_schema_and_is_merged_in_order(long, byte_tokenizer):
    replies = []

    def say(prompt: str) -> str:
        closes = "nine" if FACT in prompt else None
        replies.append(closes)
        return json.dumps({"places": ["Lindisfarne"] if closes else ["sea", "sea"], "closes": closes})

    model = Scripted(byte_tokenizer, say)
    result = model.run(answer_by(Extraction(SCHEMA), long))
    assert result.strategy == "map_reduce" and result.notes == []
    assert result.answer == {"places": ["sea", "Lindisfarne"], "closes": "nine"}
    assert model.batches[0].asks[0].schema["properties"]["closes"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert replies.count("nine") >= 1


def test_missing_fields_of_an_extraction_are_reported(long, byte_tokenizer):
    result = Scripted(byte_tokenizer, lambda _: '{"places": [], "closes": null}').run(answer_by(Extraction(SCHEMA), long))
    assert result.answer == {"places": [], "closes": None} and any("closes" in note for note in result.notes)
    cut = Scripted(byte_tokenizer, lambda _: Reply('{"places": [', complete=False)).run(answer_by(Extraction(SCHEMA), long))
    assert any("cut off" in note for note in cut.notes)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (Summary(), "map_reduce"),
        (Extraction(SCHEMA), "map_reduce"),
        (ASKED, "retrieve"),
        (Question("Who owns the harbour of Lindisfarne?"), "retrieve"),
        (Question("Summarize the harbour's history."), "map_reduce"),
        (Question("What is this document about?"), "map_reduce"),
        (Question("List all harbours."), "map_reduce"),
        (Question("How many harbours are there in total?"), "map_reduce"),
        (Question("Give me an overview"), "map_reduce"),
        (Question("Worum geht es hier?"), "map_reduce"),
        (Question("请总结这份文件"), "map_reduce"),
        (Question("Qwertz yxcvb?"), "map_reduce"),  # words that do not occur
    ],
)
def test_choice_by_task_and_question(long, task, name):
    chosen, reason = choose(task, long)
    assert chosen == name and str(f"{long.tokens:,}") in reason


def test_short_documents_are_read_whole(short):
    assert {choose(task, short)[0] for task in (Summary(), ASKED, Extraction(SCHEMA))} == {"whole"}


@pytest.mark.parametrize(
    ("task", "strategy", "error", "words"),
    [
        (ASKED, "whole", RequestError, "use map_reduce"),
        (Summary(), "retrieve", RequestError, "use map_reduce"),
        (Question("Qwertz?"), "retrieve", RequestError, "none of its words"),
        (ASKED, "guess", ConfigError, "auto, whole, window, map_reduce, retrieve"),
    ],
)
def test_unsupported_tasks_name_the_remedy(long, task, strategy, error, words):
    with pytest.raises(error, match=words):
        answer_by(task, long, strategy)


def test_window_needs_an_engine_with_a_window(short):
    with pytest.raises(RequestError, match="window"):
        answer_by(ASKED, short, "window")


def test_chunks_that_are_too_long_name_a_possible_length(byte_tokenizer):
    made = material(LONG, byte_tokenizer, max_length=900, room=1024, stride=0)
    with pytest.raises(RequestError, match="max_length") as caught:
        next(answer_by(ASKED, made, "map_reduce"))
    length = int(re.search(r"max_length=(\d+)", str(caught.value)).group(1))
    made.prompts.close()
    shorter = material(LONG, byte_tokenizer, max_length=length, room=1024, stride=0)
    assert next(answer_by(ASKED, shorter, "map_reduce")).asks
    shorter.prompts.close()


def test_a_document_without_text_is_an_error(byte_tokenizer):
    with pytest.raises(RequestError, match="no text"):
        answer_by(ASKED, material(Document(()), byte_tokenizer))


def test_reasoning_is_not_part_of_an_answer(short, byte_tokenizer):
    result = Scripted(byte_tokenizer, lambda _: "<think>Hm, a harbour.</think>\n\nAt nine.").run(answer_by(ASKED, short))
    assert result.answer == "At nine."


def test_several_files_are_distinguished(byte_tokenizer):
    made = material(Document.of_texts({"a.txt": "Alpha is red.\n", "b.txt": "Beta is blue.\n"}), byte_tokenizer)
    model = Scripted(byte_tokenizer, lambda _: "Beta is blue.")
    result = model.run(answer_by(Question("What is blue?"), made))
    assert model.prompts[0].index("a.txt") < model.prompts[0].index("Alpha") < model.prompts[0].index("b.txt")
    assert {c.file for c in result.citations} == {"b.txt"}
    made.prompts.close()
