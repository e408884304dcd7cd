"""Any JSON as the value of any keyword gives a grammar or the typed error; the meaning of references and oneOf is preserved."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_optimizer.engine.grammar.calls import CallShape
from deepseek_optimizer.engine.grammar.compiler import GrammarCompiler
from deepseek_optimizer.engine.grammar.json_schema import normalize
from deepseek_optimizer.engine.grammar.pattern import to_rules
from deepseek_optimizer.engine.grammar.schema_shapes import _SHAPES
from deepseek_optimizer.errors import RequestError
from support.random_texts import RandomModel

KEYWORDS = sorted({*_SHAPES, "const", "uniqueItems", "multipleOf", "$id", "patternProperties", "not", "title"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.sampled_from([1.0, 2.5, 1e300, -0.0, 10**30, 10**400, 1 << 63]),
    st.sampled_from(
        ["object", "array", "string", "integer", "number", "null", "date", "a", "^a{2}$", "(", "#", "#/anyOf/0", "\0"]
    ),
    st.sampled_from(["#/enum/0", "#/required", "#/$defs/a", "#/anyOf/" + "9" * 5_000, "#/properties/a", "\ud800"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2), max_leaves=6
)
SCHEMAS = st.recursive(
    st.dictionaries(st.sampled_from(KEYWORDS), JSON, min_size=1, max_size=3),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["anyOf", "oneOf", "allOf", "prefixItems", "enum"]),
            st.lists(inner, max_size=3),
            min_size=1,
            max_size=2,
        )
        | st.dictionaries(
            st.sampled_from(["$defs", "properties", "definitions"]),
            st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            min_size=1,
            max_size=2,
        )
        | st.dictionaries(st.sampled_from(["items", "additionalProperties", *KEYWORDS]), inner | JSON, min_size=1, max_size=3)
    ),
    max_leaves=5,
)
quick = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def compiler(byte_tokenizer):
    pytest.importorskip("xgrammar")
    made = GrammarCompiler(byte_tokenizer, len(byte_tokenizer), seconds=3)
    yield made
    made.close()


@settings(quick, max_examples=300)
@given(SCHEMAS)
def test_any_json_is_a_schema_or_a_typed_error(schema):
    try:
        normalize(schema)
    except RequestError as error:
        assert error.field == "json_schema" and len(str(error)) < 500 and "\n" not in str(error)


@settings(quick, max_examples=80)
@given(schema=SCHEMAS)
def test_any_json_compiles_or_is_a_typed_error(compiler, schema):
    try:
        compiler.json_schema(schema)
    except RequestError as error:
        assert "it failed" not in str(error)  # the worker ended


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_with_every_kind_of_value(keyword):
    """Alone, with each type, and in a branch of oneOf, whose branches are compared with each other."""
    for value in (None, True, -1, 1.5, 10**400, "", "a", [], [1], [[]], {}, {"a": 1}, [{}], {"a": {}}):
        for schema in (
            {keyword: value},
            *({"type": name, keyword: value} for name in ("object", "array", "string", "integer", "number")),
            {"oneOf": [{keyword: value}, {"type": "object", keyword: value}]},
            {"oneOf": [{"type": "object", "required": ["a"], keyword: value}] * 2},
            {"$defs": {"a": {keyword: value}}, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]},
        ):
            try:
                normalize(schema)
            except RequestError:
                pass


@settings(quick, max_examples=500)
@given(st.text(st.sampled_from('ab()[]{}|*+?^$\\.-,:<>0129dwxu\n"é\0\ud800'), max_size=30), st.booleans())
def test_any_text_as_a_pattern_or_a_value_error(pattern, json_string):
    try:
        to_rules(pattern, "root", json_string=json_string)
    except ValueError as error:
        assert type(error) is ValueError


@settings(quick, max_examples=40)
@given(tool=JSON | SCHEMAS)
def test_any_parameters_of_a_tool(compiler, tool):
    try:
        compiler.tools([{"function": {"name": "f", "parameters": tool}}], "required", CallShape("<", ":", ">"))
    except RequestError as error:
        assert "it failed" not in str(error)


@settings(quick, max_examples=40)
@given(text=st.text(st.sampled_from('root::= ab|()[]{}*+?"\\\n\0\ud8000-9'), max_size=40).map(lambda text: f"root ::= {text}"))
def test_any_grammar(compiler, text):
    try:
        compiler.ebnf(text)
    except RequestError as error:
        assert "it failed" not in str(error)


def test_references_are_enforced_in_every_position():
    """A value of an enum becomes a schema through a reference, and is then rejected like any other."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [{"type": "integer", "multipleOf": 2}]}, "b": {"$ref": "#/properties/a/enum/0"}},
    }
    with pytest.raises(RequestError, match="multipleOf can't be enforced"):
        normalize(schema)
    schema["properties"]["a"]["enum"] = [{"type": "string", "minLength": -1}]
    with pytest.raises(RequestError, match="minLength must be"):
        normalize(schema)
    schema["properties"]["a"]["enum"] = [5]
    with pytest.raises(RequestError, match="does not refer to a schema"):
        normalize(schema)


def test_references_into_rewritten_schemas(compiler, byte_tokenizer):
    """allOf with one schema is simplified before xgrammar gets it; a reference into it still works."""
    schema = {
        "type": "array",
        "prefixItems": [{"allOf": [{"type": "integer", "minimum": 7, "maximum": 9}]}, {"$ref": "#/prefixItems/0/allOf/0"}],
        "items": False,
        "minItems": 2,
    }
    grammar = compiler.json_schema(schema)
    texts = [RandomModel(byte_tokenizer, len(byte_tokenizer)).text(grammar, seed) for seed in range(5)]
    assert all(7 <= number <= 9 for text in texts for number in json.loads(text))


def test_a_list_of_items_is_the_older_form_of_prefix_items(compiler, byte_tokenizer):
    """As of draft 2019-09, and as pydantic 1 writes tuples."""
    schema = {"items": [{"enum": [7]}, {"$ref": "#/items/0"}, {"enum": ["a"]}], "minItems": 3, "type": "array"}
    grammar = compiler.json_schema(schema)
    texts = [RandomModel(byte_tokenizer, len(byte_tokenizer)).text(grammar, seed) for seed in range(3)]
    assert all(json.loads(text) == [7, 7, "a"] for text in texts)


@pytest.mark.parametrize(
    "branches,apart",
    [
        ([{"const": "a"}, {"const": "b"}], True),
        ([{"enum": [1, 2]}, {"enum": [3]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"const": {"a": 1, "b": 2}}, {"const": {"b": 2.0, "a": 1}}], False),
        ([{"const": 1}, {"type": "number"}], False),
        ([{"type": "integer"}, {"type": ["string", "null"]}], True),
        ([True, {"type": "string"}], False),
    ],
)
def test_one_of_branches(branches, apart):
    if apart:
        assert normalize({"oneOf": branches})
    else:
        with pytest.raises(RequestError, match="use anyOf"):
            normalize({"oneOf": branches})


def test_very_many_branches_are_not_compared():
    """Comparing all pairs would take minutes."""
    with pytest.raises(RequestError, match="more than 256 branches"):
        normalize({"oneOf": [{"const": i} for i in range(5_000)]})
