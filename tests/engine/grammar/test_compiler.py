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
from deepseek_optimizer.chat.tools.generic import written
from deepseek_optimizer.engine.grammar.calls import tools_source
from deepseek_optimizer.engine.grammar.compiler import GrammarCompiler
from deepseek_optimizer.engine.grammar.json_schema import normalize
from deepseek_optimizer.engine.grammar.source import GrammarSource, schema_source
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
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": NOW}},
]
SCHEMAS = {"weather": WEATHER, "now": NOW}


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
        for enforced in ("required", "no"):
            parser = make_output_parser("", "", tool_format=FORMATS[name], tools=SCHEMAS, enforced=enforced)
            actual = collect(parser.feed(text) + parser.finish())
            if enforced == "no" and FORMATS[name].shape.parameters and not actual.tool_calls:
                continue  # random text may contain tags
            counts.append(len(actual.tool_calls))
            assert actual.content == "" and counts[-1] >= 1, text
            for call in actual.tool_calls:
                assert choice in ("required", call.name)
                arguments = json.loads(call.arguments)
                city = arguments.get("city", "").replace("\ufffd", "")  # bytes that are no character
                assert call.name == "now" or (len(city) <= 8 and 1 <= arguments["days"] <= 9)
    assert counts and (parallel or max(counts) == 1)


def test_optional_and_invalid_tools(compiler):
    shape = FORMATS["hermes"].shape
    assert compiler.tools(TOOLS, "none", shape) is None
    assert compiler.tools(TOOLS, "auto", FORMATS["llama"].shape) is None  # whose calls have no beginning of their own
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


@pytest.mark.parametrize("name", [name for name, tool_format in FORMATS.items() if tool_format.shape])
def test_calls_in_text_are_enforced_from_their_beginning(compiler, tokenizer, name):
    tool_format = FORMATS[name]
    compiled = compiler.tools(TOOLS, "auto", tool_format.shape, parallel=False)
    if not tool_format.shape.trigger:
        assert compiled is None
        return
    call = written([{"function": {"name": "weather", "arguments": {"city": "Rome", "days": 3}}}], tool_format.shape)
    grammar = follow(compiled, tokenizer, f"Let me see < [ {{:\n{call}")
    bits = np.zeros(-(-(len(tokenizer) + PADDED) // 32), np.int32)
    assert grammar.mask(bits)
    ends = bits.view(np.uint32)[tokenizer.eos_token_id // 32] >> tokenizer.eos_token_id % 32 & 1
    assert ends  # one call, which may be followed by no other
    for wrong in (call.replace("weather", "wether"), call.replace("3", "30"), call.replace("days", "day")):
        with pytest.raises(ValueError, match="not allowed"):
            follow(compiled, tokenizer, f"See: {wrong}")
    parallel = compiler.tools(TOOLS, "auto", tool_format.shape, parallel=True)
    follow(parallel, tokenizer, f"One {call} two {call} three")


def test_calls_in_channels(compiler, tokenizer):
    """`<|end|>` and the like are ordinary text for this tokenizer."""
    compiled = compiler.compile(FORMATS["harmony"].source(TOOLS, "required", True, None))
    thought = "<|channel|>analysis<|message|>hm < <|end|><|start|>assistant"
    head = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    assert follow(compiled, tokenizer, f'{thought}{thought}{head}{{"city": "Rome", "days": 3}}').finished
    for wrong in ("<|channel|>final<|message|>x", head.replace("weather", "other"), f'{head}{{"city": 3'):
        with pytest.raises(ValueError, match="not allowed"):
            follow(compiled, tokenizer, wrong)
    auto = compiler.compile(FORMATS["harmony"].source(TOOLS, "auto", True, None))
    follow(auto, tokenizer, f"{thought}<|channel|>final<|message|>It is 3.")
    form = FORMATS["harmony"].source([], "none", True, schema_source({"enum": [{"a": 1}]}))
    assert follow(compiler.compile(form), tokenizer, f'{thought}<|channel|>final<|message|>{{"a":1}}').finished
    assert FORMATS["harmony"].source([], "none", True, None) is None


def test_white_space_is_bounded(compiler, tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "object"}},
        "required": ["a", "b"],
    }
    compiled = compiler.json_schema(schema)
    value = {"a": [1, 2], "b": {"c": {}, "d": []}}
    for text in (
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        *(json.dumps(value, indent=n) for n in (1, 2, 4)),
    ):
        assert follow(compiled, tokenizer, text).finished, text
    for text in ('{"a":  [', '{  "a"', '{\n\n"a"', '{"a": [1,\n\n', "{\n" + " " * 21, '{"a" :', " {"):
        with pytest.raises(ValueError, match="not allowed"):
            follow(compiled, tokenizer, text)


BOUNDED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "score": {"type": "number"},
        "count": {"type": "integer"},
        "kind": {"enum": ["a", "bb"]},
        "on": {"type": ["boolean", "null"]},
        "day": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
    },
    "required": ["name", "age", "score", "count", "kind", "on", "day", "tags"],
}


def longest() -> int:
    """Characters of the longest text under BOUNDED: 21 of white space at most around each of 11 items, with 42 for numbers."""
    punctuation = sum(len(json.dumps(name)) + 3 for name in BOUNDED["properties"]) + 2
    values = (10 + 2) + 3 + (1 + 40 + 1 + 40 + 2 + 40) + 41 + 4 + 5 + 12 + (3 + 4)
    places = 8 + 1 + 3 + 1  # before each property and item, and before each end
    return punctuation + values + 22 * places


@pytest.mark.parametrize("which", ["random", "lowest", "highest"])
def test_a_model_without_knowledge_ends_within_a_computed_number_of_tokens(compiler, tokenizer, which):
    """Every token has at least one byte; a character has at most four."""
    compiled = compiler.json_schema(BOUNDED)
    bits = np.zeros(-(-(len(tokenizer) + PADDED) // 32), np.int32)
    for seed in range(4 if which == "random" else 1):
        choose, grammar, ids = random.Random(seed), compiled.start(), []
        while not grammar.finished:
            assert grammar.mask(bits)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            allowed = allowed[allowed != tokenizer.eos_token_id]
            token = int(choose.choice(allowed) if which == "random" else allowed[0 if which == "lowest" else -1])
            grammar.accept(token)
            ids.append(token)
            assert len(ids) <= longest() + 3 * 10
        assert json.loads(tokenizer.decode(ids)).keys() == BOUNDED["properties"].keys()


def test_large_schemas_are_not_enforced_in_auto():
    """They would take seconds to compile."""
    tool = {"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": ["x" * 100_000]}}}}}
    shape = FORMATS["hermes"].shape
    assert len(tools_source([tool], "auto", shape).text) < 2_000 < len(tools_source([tool], "required", shape).text)
