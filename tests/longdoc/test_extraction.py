"""How partial extractions are merged into one value."""

from __future__ import annotations

import pytest

from deepseek_optimizer.engine.grammar.json_schema import normalize
from deepseek_optimizer.errors import RequestError
from deepseek_optimizer.longdoc.extraction import merged, problems, relaxed, without_gaps
from deepseek_optimizer.longdoc.tasks import Extraction

SCHEMA = {
    "type": "object",
    "title": "Invoice",
    "properties": {
        "number": {"type": "string", "description": "as printed"},
        "total": {"type": "number"},
        "items": {"type": "array", "minItems": 2, "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        "seller": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["number", "items"],
    "minProperties": 2,
}


def test_schemas_of_parts_make_every_field_optional():
    part = relaxed(SCHEMA)
    normalize(part)
    nothing = {"number": None, "total": None, "items": [], "seller": {"name": None}}
    assert problems(part, nothing) == [] and problems(SCHEMA, nothing)
    assert SCHEMA["required"] == ["number", "items"]  # unchanged


def test_arrays_are_joined_and_the_first_value_counts():
    values = [
        None,
        {"number": None, "items": [{"n": 1}, {"n": 2}], "seller": {"name": None}},
        {"number": "A", "total": 0, "items": [{"n": 2}, {"n": 3}], "seller": {"name": "X"}},
        {"number": "B", "total": 5, "items": [], "seller": {"name": "Y"}},
    ]
    value = merged(values)
    assert value == {"number": "A", "total": 0, "items": [{"n": 1}, {"n": 2}, {"n": 3}], "seller": {"name": "X"}}
    assert problems(SCHEMA, value) == []


def test_equal_items_are_merged_but_true_is_not_1():
    assert merged([[1, True, {"a": 1, "b": 2}], [True, 1, {"b": 2, "a": 1}, "1"]]) == [1, True, {"a": 1, "b": 2}, "1"]


def test_optional_gaps_are_omitted():
    assert without_gaps({"number": None, "total": None, "items": []}, SCHEMA) == {"number": None, "items": []}
    assert any(problem.startswith("number: ") for problem in problems(SCHEMA, {"number": None, "items": [{}, {}]}))


def test_search_terms_come_from_the_schema():
    words = Extraction(SCHEMA).words
    assert "Invoice" in words and "number as printed" in words and "seller" in words


@pytest.mark.parametrize(
    "schema", [{}, {"type": "array", "items": {}}, [], {"properties": {"a": {"not": {}}}}, {"type": "object"}]
)
def test_unsupported_schemas_are_rejected(schema):
    with pytest.raises(RequestError):
        Extraction(schema)
