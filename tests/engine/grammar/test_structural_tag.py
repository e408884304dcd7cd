"""Structural tags: what is refused, and how schemas and patterns in them are rewritten."""

from __future__ import annotations

import json

import pytest

from deepseek_optimizer.engine.grammar.source import choice_source, grammar_source
from deepseek_optimizer.engine.grammar.structural_tag import structural_tag_source
from deepseek_optimizer.errors import RequestError

TEXT = {"type": "const_string", "value": "x"}
TAG = {"begin": "<a>", "content": TEXT, "end": "</a>"}


def nested(depth):
    return TEXT if depth == 0 else {"type": "optional", "content": nested(depth - 1)}


def test_schemas_and_patterns_become_grammars():
    elements = [
        {"type": "json_schema", "json_schema": {"type": "integer"}, "style": "json"},
        {"type": "regex", "pattern": "a+"},
    ]
    source = structural_tag_source({"format": {"type": "sequence", "elements": elements}})
    schema, pattern = json.loads(source.text)["format"]["elements"]
    assert source.kind == "structure" and schema.keys() == {"schema", "rules"}
    assert pattern["type"] == "grammar" and pattern["grammar"].startswith("root ::=")


def test_the_older_form():
    tag = {"structures": [{"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}], "triggers": ["<f"]}
    source = structural_tag_source(json.dumps(tag))
    actual = json.loads(source.text)["format"]
    assert (actual["type"], actual["triggers"], actual["tags"][0]["begin"]) == ("triggered_tags", ["<f"], "<f>")


@pytest.mark.parametrize(
    "format, message",
    [
        (None, "format: must be an object with a type"),
        ("x", "format: must be an object"),
        ({"type": "token", "token": "x"}, "'token' is not a supported format; use one of const_string"),
        ({"type": ["x"]}, "is not a supported format"),
        ({"type": "const_string"}, "format.value: is missing"),
        ({"type": "const_string", "value": ""}, "format.value: must be a string"),
        ({"type": "json_schema", "json_schema": {}, "style": "qwen_xml"}, "style: must be"),
        ({"type": "json_schema", "json_schema": {"not": {}}}, "format.json_schema:"),
        ({"type": "json_schema", "json_schema": {}, "any_order": True}, "any_order: is not supported"),
        ({"type": "regex", "pattern": "("}, "format.pattern:"),
        ({"type": "sequence", "elements": []}, "format.elements: must be"),
        ({"type": "or", "elements": [TEXT, 1]}, "format.elements.1: must be an object"),
        ({"type": "triggered_tags", "tags": [{**TAG, "end": None}], "triggers": ["<a"]}, "tags.0.end"),
        ({"type": "tags_with_separator", "tags": [TAG], "separator": 1}, "separator: must be a string"),
        ({"type": "tags_with_separator", "tags": [TAG], "separator": "", "at_least_one": 1}, "at_least_one: must be true"),
        ({"type": "repeat", "content": TEXT, "min": 0, "max": 10**9}, "max: must be an integer"),
        ({"type": "repeat", "content": TEXT, "min": True, "max": 1}, "min: must be an integer"),
        (nested(17), "nests them more than 16 deep"),
        ({"type": "or", "elements": [TEXT] * 1001}, "more than 1,000 formats"),
    ],
)
def test_invalid_tags(format, message):
    with pytest.raises(RequestError, match=r"structural_tag: ") as error:
        structural_tag_source({"format": format})
    assert message in str(error.value)


@pytest.mark.parametrize("tag", [1, "[", "[]", "{" * 100_000, {"format": float("nan")}, {"structures": 1}, {"structures": [1]}])
def test_what_is_no_tag(tag):
    with pytest.raises(RequestError, match=r"^structural_tag: "):
        structural_tag_source(tag)


def test_large_tags():
    with pytest.raises(RequestError, match="larger than"):
        structural_tag_source({"format": {"type": "const_string", "value": "x" * (1 << 18)}})


@pytest.mark.parametrize("choices", [[], [""], ["a", 1], ["x"] * 1001, ["x" * 40_000, "y" * 40_000]])
def test_invalid_choices(choices):
    with pytest.raises(RequestError, match=r"^choice: "):
        choice_source(choices)


@pytest.mark.parametrize(
    "text, kind",
    [
        ('root ::= "a"', "ebnf"),
        ("nothing", "ebnf"),
        ('start: "a"', "lark"),
        ('// a comment\n?start: NAME\nNAME.2: /[a-z]+/\n%ignore " "', "lark"),
    ],
)
def test_notations_of_grammars(text, kind):
    assert grammar_source(text).kind == kind
