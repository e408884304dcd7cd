"""Grammars: random tokens under a mask always give valid text, and users' grammars cannot harm the server."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading

import numpy as np
import pytest

from deepseek_optimizer.chat.deltas import collect
from deepseek_optimizer.chat.output_parser import make_output_parser
from deepseek_optimizer.chat.tools import FORMATS
from deepseek_optimizer.engine.grammar.compiler import GrammarCompiler
from deepseek_optimizer.engine.grammar.json_schema import normalize
from deepseek_optimizer.engine.grammar.source import GrammarSource
from deepseek_optimizer.errors import RequestError
from support.random_texts import RandomModel
from support.schemas import GOOD, REFUSED, deep
from support.tiny_v3 import tiny_v3

pytest.importorskip("xgrammar")
PADDED = 40  # logits in addition to the tokenizer's tokens
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_v3())


@pytest.fixture(scope="module")
def compiler(tokenizer):
    made = GrammarCompiler(tokenizer, len(tokenizer) + PADDED, seconds=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tokenizer):
    return RandomModel(tokenizer, len(tokenizer) + PADDED)


def follow(compiled, tokenizer, text):
    grammar = compiled.start()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        grammar.accept(token)
    return grammar


def check_schema(compiler, model, schema, texts):
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    compiled = compiler.json_schema(schema)
    result = [model.text(compiled, seed) for seed in range(texts)]
    ended = [text for text in result if text is not None]
    assert len(ended) > texts // 2
    for text in ended:
        assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("name", GOOD)
def test_texts_under_a_schema_are_valid(compiler, model, name):
    check_schema(compiler, model, GOOD[name], 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_texts_under_a_schema_are_valid_with_the_tokenizer_of_smollm2(smollm2, name):
    check_schema(*smollm2, GOOD[name], 40)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    from deepseek_optimizer.bench import smollm2
    from deepseek_optimizer.bench.unoptimized_model import dequantized

    tokenizer = AutoTokenizer.from_pretrained(dequantized(smollm2.fetch()))
    made = GrammarCompiler(tokenizer, len(tokenizer) + PADDED)
    yield made, RandomModel(tokenizer, len(tokenizer) + PADDED)
    made.close()


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_schemas_are_rejected(compiler, name):
    schema, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as caught:
        compiler.json_schema(schema)
    assert caught.value.field == "json_schema" and ".cc" not in str(caught.value)


def test_deep_schemas_of_any_depth_are_rejected(compiler):
    assert normalize(deep(30))
    for levels in (40, 900, 100_000):
        with pytest.raises(RequestError, match="deep"):
            compiler.json_schema(deep(levels))


def test_normalizing_does_not_modify_the_schema():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0.5}},
        "required": ["a", "b"],
        "additionalProperties": {},
    }
    before = json.dumps(schema)
    normalize(schema)
    assert json.dumps(schema) == before


def random_pattern(choose: random.Random, depth: int = 0) -> str:
    kind = choose.random()
    if depth > 4 or kind < 0.3:
        return choose.choice(["a", "b", "[ab]", "c", "[^c]", r"\w", ".", r"\S", "[^a-z]", "1", r"\."])
    if kind < 0.6:
        return random_pattern(choose, depth + 1) + random_pattern(choose, depth + 1)
    if kind < 0.75:
        return f"({random_pattern(choose, depth + 1)}|{choose.choice(['', random_pattern(choose, depth + 1)])})"
    return f"(?:{random_pattern(choose, depth + 1)}){choose.choice(['?', '*', '+', '{1,2}', '{2}', '{1,6}', '{0,3}', '{2,}'])}"


@pytest.mark.parametrize("seed", range(60))
def test_random_patterns(compiler, model, seed):
    pattern = random_pattern(random.Random(seed))
    try:
        compiled = compiler.json_schema({"type": "string", "pattern": f"^{pattern}$"})
    except RequestError as error:
        assert "too large" in str(error)
        return
    for i in range(6):
        text = model.text(compiled, i, 100)
        assert text is None or re.fullmatch(pattern, json.loads(text)), (pattern, text)


def test_strings_of_bounded_length_are_counted_in_characters(compiler, tokenizer):
    compiled = compiler.json_schema({"type": "string", "maxLength": 6})
    assert follow(compiled, tokenizer, '"aé深👩 /"').finished
    for text in ('"\x01"', '"\x0b"', '"\n"', '"1234567"'):
        with pytest.raises(ValueError, match="is not allowed"):
            follow(compiled, tokenizer, text)


def test_any_object(compiler, model):
    texts = [model.text(compiler.json_object(), seed) for seed in range(20)]
    assert all(isinstance(json.loads(text), dict) for text in texts if text is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "a|",
        r"[\^\]-]{2}[]x]",
        "^(?P<n>a{2,}?)$",
        r"\u00e9\x41\.\t?",
        "[a-c]{3}|x+",
        r"\d{4}-\d\d",
        "(yes|no)",
        "深度(学习)?",
        r"[^\s]+@[a-z]+\.com",
    ],
)
def test_regular_expressions(compiler, model, pattern):
    for seed in range(10):
        text = model.text(compiler.regex(pattern), seed)
        assert text is None or re.fullmatch(pattern, text), text


def test_ebnf(compiler, model):
    compiled = compiler.ebnf('root ::= item ("," item)*\nitem ::= "a" | "(" root ")"')
    for seed in range(10):
        text = model.text(compiled, seed)
        assert text is None or (set(text) <= set("a,()") and text.count("(") == text.count(")"))


@pytest.mark.parametrize("choice", ["required", "weather", "now"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", [name for name, tool_format in FORMATS.items() if tool_format.shape])
def test_required_calls_are_enforced(compiler, model, name, choice, parallel):
    compiled = compiler.tools(TOOLS, choice, FORMATS[name].shape, parallel)
    counts = []
    for seed in range(8):
        text = model.text(compiled, seed)
        if text is None:
            continue
        parser = make_output_parser("", "", tool_format=FORMATS[name], tool_names=["weather", "now"])
        actual = collect(parser.feed(text) + parser.finish())
        counts.append(len(actual.tool_calls))
        assert actual.content == "" and counts[-1] >= 1, text
        for call in actual.tool_calls:
            assert choice in ("required", call.name)
            arguments = json.loads(call.arguments)
            assert call.name == "now" or (len(arguments["city"]) <= 8 and 1 <= arguments["days"] <= 9)
    assert counts and (parallel or max(counts) == 1)


def test_optional_and_invalid_tools(compiler):
    shape = FORMATS["hermes"].shape
    assert compiler.tools(TOOLS, "auto", shape) is None and compiler.tools(TOOLS, "none", shape) is None
    for tools, choice in ((TOOLS, "other"), ([], "required")):
        with pytest.raises(RequestError, match="tool_choice: there"):
            compiler.tools(tools, choice, shape)
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]
    with pytest.raises(RequestError, match="tools: parameters of f: #: not can't"):
        compiler.tools(bad, "required", shape)


def test_rollback_restores_the_state(compiler, tokenizer):
    compiled = compiler.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    ids = tokenizer('{"a": 12}', add_special_tokens=False)["input_ids"]
    grammar, masks = compiled.start(), []
    for token in ids:
        bits = np.zeros(-(-(len(tokenizer) + PADDED) // 32), np.int32)
        assert grammar.mask(bits)
        masks.append(bits)
        grammar.accept(token)
    assert grammar.finished
    for back in range(1, len(ids) + 1):
        grammar.rollback(back)
        bits = np.zeros_like(masks[0])
        assert grammar.mask(bits) and (bits == masks[-back]).all() and not grammar.finished
        for token in ids[-back:]:
            grammar.accept(token)
    grammar = compiled.start()
    with pytest.raises(ValueError, match="is not allowed"):
        grammar.accept(ids[-1])
    assert follow(compiled, tokenizer, '{"a": 12}').finished


def test_the_end_of_text_can_be_rolled_back(compiler, tokenizer):
    grammar = follow(compiler.regex("a+"), tokenizer, "aa")
    assert not grammar.finished
    grammar.accept(tokenizer.eos_token_id)
    bits = np.zeros(-(-(len(tokenizer) + PADDED) // 32), np.int32)
    assert grammar.finished and grammar.mask(bits)
    assert np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist() == [tokenizer.eos_token_id]
    grammar.rollback(1)
    assert not grammar.finished and grammar.mask(bits)
    assert bits.view(np.uint32)[tokenizer.eos_token_id // 32] >> tokenizer.eos_token_id % 32 & 1


def test_special_tokens_are_not_text(compiler, tokenizer):
    grammar = follow(compiler.json_object(), tokenizer, '{"x')
    bits = np.zeros(-(-(len(tokenizer) + PADDED) // 32), np.int32)
    assert grammar.mask(bits)
    allowed = set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())
    assert not allowed & set(tokenizer.all_special_ids) and len(allowed) > 1000


@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_after_reasoning(compiler, tokenizer, opened):
    compiled = compiler.after_thoughts(compiler.regex("yes|no"), "<think>", "</think>", opened)
    opens, closes = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    word = tokenizer("anything at all", add_special_tokens=False)["input_ids"]
    answer = tokenizer("yes", add_special_tokens=False)["input_ids"]
    ids = [*([] if opened else [opens]), *word, closes, *answer]
    grammar = compiled.start()

    def allowed():
        bits = np.full(-(-(len(tokenizer) + PADDED) // 32), -1, np.int32)
        some = grammar.mask(bits)
        flags = np.unpackbits(bits.view(np.uint8), bitorder="little").astype(bool)
        return flags if some else np.ones_like(flags)

    for back in (0, 1, len(answer) + 1, len(answer) + 2, len(ids)):
        grammar.rollback(back)
        for token in ids[len(ids) - back if back else 0 :]:
            flags = allowed()
            assert flags[token] and (not flags[tokenizer.eos_token_id]), (back, token)
            grammar.accept(token)
        assert grammar.finished
    grammar = compiled.start()
    assert allowed()[word[0]] == opened
    if not opened:
        for token in answer:
            grammar.accept(token)
        assert grammar.finished
        grammar.rollback(len(answer))
        assert allowed()[opens] and not grammar.finished


def test_reasoning_needs_an_end_token(compiler):
    with pytest.raises(RequestError, match="no token"):
        compiler.after_thoughts(compiler.json_object(), "<think>", "</thought-of>", True)


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        ("regex", "", "1 to"),
        ("regex", 5, "1 to"),
        ("regex", "a" * 9_000, "1 to"),
        ("regex", "a\0", "no character"),
        ("regex", "\ud800", "no character"),
        ("regex", "(", "not closed"),
        ("regex", "(?=x)", "Lookahead"),
        ("regex", r"(a)\1", "can't be enforced"),
        ("regex", "(a{1,1000}){1,1000}", "large"),
        ("regex", "((((a{0,90}){0,90}){0,90}){0,90}){0,90}", "large"),
        ("ebnf", 'root ::= root root | "a" | ""', "ambiguous"),
        ("ebnf", 'root ::= s\ns ::= s s s | s s | "a"', "ambiguous"),
        ("ebnf", "a\0", "NUL"),
        ("ebnf", "\ud800", "surrogate"),
        ("ebnf", r"root ::= [\U0000d800]", "long|failed|ebnf|EBNF|grammar"),
        ("ebnf", "root ::= x", "not defined"),
        ("ebnf", 'x ::= "a"', "root"),
        ("ebnf", "root ::= " + "(" * 30_000, "EBNF"),
        ("ebnf", "\n".join(f'r{i} ::= r{i + 1} r{i + 1}' for i in range(40)) + '\nr40 ::= "a"\nroot ::= r0', ""),
    ],
)  # fmt: skip
def test_malicious_grammars_are_rejected_without_side_effects(compiler, tokenizer, method, source, message):
    with pytest.raises(RequestError, match=message):
        getattr(compiler, method)(source)
        compiler.compile(GrammarSource("no such kind", "", method))  # in case it compiles
    assert follow(compiler.regex("ok"), tokenizer, "ok").finished


def test_a_compiler_that_is_killed_is_replaced(tokenizer):
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    try:
        compiler.regex("a")
        killed = compiler.pids
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert follow(compiler.regex("b"), tokenizer, "b").finished, "an external kill is not the grammar's fault"
        assert compiler.pids and not set(compiler.pids) & set(killed)
    finally:
        pids = compiler.pids
        compiler.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert follow(compiler.regex("a"), tokenizer, "a").finished, "cached grammars stay usable"
    with pytest.raises(RequestError, match="shutting down"):
        compiler.regex("c")


def test_a_grammar_is_compiled_once_and_the_cache_is_bounded(compiler, monkeypatch):
    first = compiler.regex("cached")
    assert compiler.regex("cached") is first
    monkeypatch.setattr("deepseek_optimizer.engine.grammar.compiler._CACHED", 3)
    for i in range(5):
        compiler.regex(f"b{i}")
    assert len(compiler._cache) == 3 and compiler.regex("cached") is not first


def test_concurrent_compilation(tokenizer, compiler):
    actual: list = []

    def ask(i):
        actual.append(follow(compiler.regex(f"t{i % 4}"), tokenizer, f"t{i % 4}").finished)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == [True] * 16


def test_missing_xgrammar_names_the_remedy(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xgrammar", None)
    with pytest.raises(RequestError, match="pip install"):
        GrammarCompiler(tokenizer, len(tokenizer)).json_object()
