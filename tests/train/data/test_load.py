"""From files of chats and texts to sequences: which tokens are trained on, and which records are rejected or skipped."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from deepseek_optimizer.errors import ConfigError, DataError
from deepseek_optimizer.train.data import DataOptions, load_data
from support.chat_templates import deepseek_r1, llama3, qwen

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


@pytest.fixture
def load(tmp_path, byte_tokenizer):
    """load(records or bytes, name=..., tokenizer=..., **options) -> (dataset, report)."""

    def run(content, name="data.jsonl", tokenizer=None, context=4096, **options):
        file = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content).encode()
        file.write_bytes(content)
        return load_data(file, tokenizer or byte_tokenizer, context, DataOptions(**options), cache=tmp_path / "cache")

    return run


def said(dataset, tokenizer, index=0):
    """(whole sequence, tokens that are trained on), as text."""
    row = dataset[index]
    trained = row["labels"] != -100
    assert (row["labels"][trained] == row["input_ids"][trained]).all() and not trained[0]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(row["input_ids"][trained])


FORMS = [
    ({"messages": CHAT}, "the fox<|end|>"),
    ({"messages": CHAT * 2, "id": 7}, "the fox<|end|>" * 2),
    ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}, "yes<|end|>"),
    ({"conversations": CHAT, "system": "be brief"}, "the fox<|end|>"),
    ({"prompt": "hello", "completion": "you"}, "you<|end|>"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "the fox<|end|>"),
    ({"instruction": "say", "input": "it", "output": "done"}, "done<|end|>"),
    ({"instruction": "say", "input": "", "output": "done", "system": "be brief"}, "done<|end|>"),
]


def test_only_answers_are_trained_on_in_every_form(load, byte_tokenizer):
    records = [record for record, _ in FORMS]
    answers, report = load(records)
    everything, _ = load(records, assistant_only=False)
    assert (report.records, report.sequences) == (len(FORMS), len(FORMS)) == (len(answers), len(everything))
    assert report.tokens == answers.tokens == everything.tokens
    assert report.trained_tokens == sum(int((answers[i]["labels"] != -100).sum()) for i in range(len(answers)))
    for i, (record, answer) in enumerate(FORMS):
        whole, trained = said(answers, byte_tokenizer, i)
        assert trained == answer and whole.startswith("<|system|>be brief<|end|>" if "system" in record else "<|user|>")
        first = byte_tokenizer.decode(answers[i]["input_ids"][:1])
        assert said(everything, byte_tokenizer, i) == (whole, whole.removeprefix(first))
    assert said(answers, byte_tokenizer, 6)[0] == "<|user|>say\n\nit<|end|><|assistant|>done<|end|>"


def test_generation_marks_of_a_template_are_used(load, byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = MARKED
    dataset, _ = load([{"messages": CHAT * 2}], tokenizer=tokenizer)
    assert said(dataset, tokenizer)[1] == "the fox<|end|>" * 2


@pytest.mark.parametrize("make", [qwen, deepseek_r1, llama3])
def test_sequences_equal_the_rendered_template(load, make):
    tokenizer = make()
    chat = [{"role": "system", "content": "you are"}, *CHAT, {"role": "user", "content": "again"}, *CHAT[1:]]
    dataset, _ = load([{"messages": chat}], tokenizer=tokenizer)
    want = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert dataset[0]["input_ids"].tolist() == want
    end = tokenizer.eos_token
    assert said(dataset, tokenizer)[1] == f"the fox{end}" * 2


def test_control_tokens_in_messages_are_text(load):
    tokenizer = qwen()
    dataset, _ = load([{"messages": [{"role": "user", "content": "<|im_start|>assistant"}, CHAT[1]]}], tokenizer=tokenizer)
    starts = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (dataset[0]["input_ids"] == starts).sum() == 2


def test_tools_and_calls_are_kept(load):
    tokenizer = qwen()
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "fox"}}}]}
    chat = [CHAT[0], call, {"role": "tool", "content": "", "name": "look"}, CHAT[1]]
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
             {"from": "observation", "value": "a fox"}, {"from": "gpt", "value": "yes"}]  # fmt: skip
    records = [{"messages": chat, "tools": [TOOL]}, {"conversations": turns, "tools": json.dumps([TOOL])}]
    dataset, _ = load(records, tokenizer=tokenizer)
    whole, trained = said(dataset, tokenizer, 0)
    assert '"name": "look"' in whole and "<tool_response>" in whole
    assert trained == '\n<tool_call>\n{"name": "look", "arguments": {"at": "fox"}}\n</tool_call><|im_end|>the fox<|im_end|>'
    whole, trained = said(dataset, tokenizer, 1)
    assert "a fox" in whole and '"arguments": {}' in trained and trained.endswith("yes<|im_end|>")


def test_reasoning_is_trained_as_written_or_rejected(load):
    tokenizer = deepseek_r1()
    thought = {"role": "assistant", "content": "the fox", "reasoning_content": "who jumps"}
    inline = {"role": "assistant", "content": "<think>\nwho jumps\n</think>\n\nthe fox"}
    records = [{"messages": [CHAT[0], message, CHAT[0], CHAT[1]]} for message in (thought, inline)]
    with pytest.raises(DataError, match=r"line 1, messages\[1\]: .* omits reasoning; .*per_answer=True"):
        load(records, tokenizer=tokenizer)
    dataset, _ = load(records, tokenizer=tokenizer, per_answer=True)
    assert len(dataset) == 4
    for i in (0, 2):
        whole, trained = said(dataset, tokenizer, i)
        assert whole.endswith("<｜Assistant｜><think>\n" + trained)
        assert trained == "who jumps\n</think>\n\nthe fox<｜end▁of▁sentence｜>"
        assert said(dataset, tokenizer, i + 1)[1] == "the fox<｜end▁of▁sentence｜>"


def test_a_template_without_answer_marks_is_an_error_with_remedies(load, byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = (  # a question is rendered differently once it has an answer
        "{% for m in messages %}{{ loop.length }}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"data.jsonl, line 1: .*per_answer=True.*assistant_only=False"):
        load([{"messages": CHAT}], tokenizer=tokenizer)
    assert said(load([{"messages": CHAT}], tokenizer=tokenizer, assistant_only=False)[0], tokenizer)[0].startswith("2<|user|>")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        load([{"messages": CHAT}], tokenizer=tokenizer)
    whole, trained = said(load([{"prompt": "1 + 1 =", "completion": " 2"}], tokenizer=tokenizer)[0], tokenizer)
    assert (whole, trained) == ("1 + 1 = 2<|end|>", " 2<|end|>")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"messages": [', r"line 2: is not valid JSON: Expecting value at character 16"),
        (b"[1, 2]", r"line 2: a line must be a JSON object, got list"),
        (b'{"text": NaN}', r"line 2: is not valid JSON: NaN is not a JSON number"),
        (b'{"text": 1e999}', r"line 2: is not valid JSON: 1e999 is too large"),
        (b'{"text": "\xff"}', r"line 2: is not UTF-8: byte 11 is 0xFF"),
        (b'{"text": "a\0"}', r"line 2: is not text: it contains NUL"),
        (b"[" * 100_000, r"line 2: is nested too deeply"),
        (b'{"text": 3}', r"line 2, text: must be a string, got int"),
        (b'{"text": "  "}', r"line 2, text: is empty"),
        (b'{"text": "\\ud800"}', r"line 2, text: has half of a surrogate"),
        (b'{"prompt": "x", "completion": ""}', r"line 2, completion: is empty"),
        (b'{"prompt": "x"}', r"line 2: has none of the supported forms .* it has prompt"),
        (b"{}", r"line 2: has none of the supported forms"),
        (b'{"instruction": ["x"], "output": "y"}', r"line 2, instruction: must be a string, got list"),
        (b'{"messages": []}', r"line 2, messages: must be a list of at least one message"),
        (b'{"messages": "hello"}', r"line 2, messages: must be a list"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', r"line 2, messages\[0\].role: must be one of system"),
        (b'{"messages": [{"role": "user", "content": " "}]}', r"line 2, messages\[0\].content: is empty"),
        (b'{"messages": [{"role": "user", "content": 5}]}', r"line 2, messages\[0\].content: must be a string"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', r"line 2: has no assistant message"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', r"line 2, messages\[0\]: begins with an assistant message"),
        (b'{"conversations": [{"from": "cat", "value": "x"}]}', r"line 2, conversations\[0\].from: must be one of human"),
        (b'{"conversations": [{"from": "gpt", "value": 1}]}', r"line 2, conversations\[0\].value: must be a string, got int"),
        (b'{"conversations": [{"from": "gpt"}]}', r"line 2, conversations\[0\].value: must be a string, got NoneType"),
        (b'{"conversations": 4}', r"line 2, conversations: must be a list"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": 3}', r"line 2, tools: must be a list"),
    ],
)  # fmt: skip
def test_an_invalid_line_is_named_or_skipped(load, line, error):
    data = json.dumps({"text": "quick"}).encode() + b"\n" + line + b"\n" + json.dumps({"text": "fox"}).encode()
    with pytest.raises(DataError, match=r"data.jsonl, " + error) as caught:
        load(data)
    assert "skip_bad_lines=True" in str(caught.value)
    dataset, report = load(data, skip_bad_lines=True)
    assert (len(dataset), report.records, report.bad) == (2, 3, 1)
    assert [str(dataset.place(i)).rpartition(" ")[2] for i in range(2)] == ["1", "3"]
    assert report.remarks()[0] == "1 invalid record(s) skipped"


def test_all_invalid_lines_are_counted_and_five_shown(load):
    with pytest.raises(DataError, match="7 records are invalid; the first 5") as caught:
        load(b'{"text": 1}\n' * 7 + b'{"text": "good"}\n')
    assert str(caught.value).count("text: must be a string") == 5
    with pytest.raises(DataError, match="no valid record is left"):
        load(b'{"text": 1}\n' * 7, skip_bad_lines=True)


def test_a_huge_line_is_rejected_without_reading_it_whole(load, monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.train.data.records.MAX_BYTES", 1 << 20)
    data = b'{"text": "' + b"x" * (1 << 21) + b'"}\n{"text": "good"}\n'
    with pytest.raises(DataError, match=r"line 1: has more than 1 MB"):
        load(data)
    assert str(load(data, skip_bad_lines=True)[0].place(0)).endswith("line 2")


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_files_are_rejected(load, content):
    for name in ("a.jsonl", "b.json", "c.txt"):
        with pytest.raises(DataError, match=r"is empty|is not valid JSON"):
            load(content, name=name)


def test_arrays_of_records(load):
    dataset, _ = load(json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode(), name="data.json")
    assert len(dataset) == 2 and dataset.place(1).line == 2
    for content, error in (
        (b'{"text": "x"}', "must be an array"),
        (b"[]", "empty array"),
        (b"[1,\n2 3]", "line 2, character 3"),
        (b'[{"text": "x"}, 3]', "line 2: a record must be a JSON object"),
    ):
        with pytest.raises(DataError, match=error):
            load(content, name="data.json")


def test_texts_are_split_into_sequences(load, byte_tokenizer, tmp_path):
    text = "the quick brown fox\n" * 100
    dataset, report = load(text.encode(), name="a.txt", max_length=64)
    assert dataset.lengths.tolist() == [64] * 31 + [17] and report.tokens == 2001
    joined = [i for k in range(len(dataset)) for i in dataset[k]["input_ids"].tolist()]
    assert byte_tokenizer.decode(joined) == text + "<|end|>"
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").write_text("no")
    (folder / "b.md").write_text("second")
    (folder / "a.jsonl").write_text('{"text": "first"}')
    (folder / "sub" / "c.txt").write_text("third")
    dataset, _ = load_data([str(folder), str(folder / "b.md")], byte_tokenizer, 4096, cache=tmp_path / "cache")
    assert [said(dataset, byte_tokenizer, i)[0] for i in range(3)] == ["first<|end|>", "second<|end|>", "third<|end|>"]
    (folder / "d.txt").write_bytes(b"\0\1")
    with pytest.raises(DataError, match="d.txt: is not text"):
        load_data(str(folder), byte_tokenizer, 4096, cache=tmp_path / "cache")
    for path, error in ((tmp_path / "none", "does not exist"), (tmp_path / "cache2", "has no files")):
        (tmp_path / "cache2").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=error):
            load_data(path, byte_tokenizer, 4096, cache=tmp_path / "cache")


def test_a_large_text_is_tokenized_in_blocks(load, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("deepseek_optimizer.train.data.encode._BLOCK", 50)
    text = "the quick brown fox\n" * 10 + "x" * 120
    dataset, _ = load(text.encode(), name="a.txt")
    assert said(dataset, byte_tokenizer)[0] == text + "<|end|>"


def test_too_long_sequences(load, byte_tokenizer):
    records = [{"text": "x" * 15}, {"text": "x" * 108}]
    with pytest.raises(DataError, match=r"line 2: has 109 tokens, more than the maximum of 50; .*truncate, split or skip"):
        load(records, max_length=50)
    with pytest.raises(DataError, match=r"line 2: has 109 tokens, more than the maximum of 80"):
        load(records, context=80)
    actual = {way: load(records, max_length=50, too_long=way) for way in ("truncate", "split", "skip")}
    assert {way: dataset.lengths.tolist() for way, (dataset, _) in actual.items()} == {
        "truncate": [16, 50], "split": [16, 50, 50, 9], "skip": [16],
    }  # fmt: skip
    reports = [actual[way][1] for way in actual]
    assert [(r.truncated, r.split, r.skipped) for r in reports] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    answered = load([{"prompt": "x" * 60, "completion": "y"}], max_length=50, too_long="split")
    assert (len(answered[0]), answered[1].without_answer) == (1, 1)


def test_options_are_checked(load):
    with pytest.raises(ConfigError, match="max_length=5,000 is more than the 4,096"):
        load([{"text": "x"}], max_length=5000)
    for options in ({"max_length": 1}, {"max_length": True}, {"too_long": "cut"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DataOptions(**options)


def test_tokens_are_cached_until_anything_changes(load, byte_tokenizer, tmp_path, monkeypatch):
    records = [{"text": "quick"}, {"text": "fox"}]
    first, report = load(records)
    assert isinstance(first._tokens, np.memmap) and first._tokens.dtype == np.int32

    def fails(*_):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr("deepseek_optimizer.train.data.encode.ExampleEncoder.encode", fails)
        again, report_again = load(records)
        assert report_again == report and (again[0]["labels"] == first[0]["labels"]).all()
        changed = [
            lambda: load(records[:1]),
            lambda: load(records, assistant_only=False),
            lambda: load(records, context=99),
            lambda: load(records, tokenizer=qwen()),
        ]
        for change in changed:
            with pytest.raises(AssertionError, match="made again"):
                change()
    kept = [entry for entry in (tmp_path / "cache").iterdir()]
    assert len(kept) == 1  # and nothing of the failed run
    with (kept[0] / "tokens.int32").open("ab") as file:  # damaged: created again
        file.write(b"more")
    assert len(load(records)[0]) == 2 and os.path.getsize(kept[0] / "tokens.int32") % 4 == 0


def test_the_cache_keeps_the_latest_entries(load, tmp_path):
    for i in range(12):
        load([{"text": f"number {i}"}])
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_the_evaluation_set_is_drawn_by_record(load):
    dataset, _ = load([{"text": "x" * (10 + i)} for i in range(40)], max_length=12, too_long="split")
    train, held = dataset.split(0.1, seed=3)
    lines = [{part.place(i).line for i in range(len(part))} for part in (train, held)]
    assert len(lines[1]) == 4 and not lines[0] & lines[1] and len(train) + len(held) == len(dataset)
    assert train.tokens + held.tokens == dataset.tokens
    again = dataset.split(0.1, seed=3)[1]
    assert [again.place(i) for i in range(len(again))] == [held.place(i) for i in range(len(held))]
    assert {held.place(i).line for i in range(len(held))} != {
        p.place(i).line for p in dataset.split(0.1, 4)[1:] for i in range(len(p))
    }
    one, _ = load([{"text": "x"}])
    with pytest.raises(DataError, match="cannot be split"):
        one.split(0.5, 0)
    with pytest.raises(IndexError):
        one[1]
