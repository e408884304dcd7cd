"""JSON schemas made ready for xgrammar, so that every text of the grammar is valid under the schema.

xgrammar leaves keywords out in silence that it can't express. Here each keyword is known: it is enforced, it is rewritten into
one that is, it is an annotation and dropped, or the schema is refused. Where a schema leaves open what else may come, the
grammar takes less: objects with `properties` have no others unless `additionalProperties` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import RequestError
from .pattern import to_rules

MOST_DEPTH, MOST_NODES, MOST_BYTES, MOST_LENGTH = 32, 4_000, 1 << 18, 1 << 16
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
_OF_TYPE["integer"] = _OF_TYPE["number"]
_KNOWN = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"}.union(*_OF_TYPE.values())
_REFUSED = {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "multipleOf", "uniqueItems", "patternProperties",
    "propertyNames", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
    "additionalItems", "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "$anchor", "$id", "id",
}  # fmt: skip
_DAY = r"\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[a-z]([a-z0-9]{0,20})"
# What these formats allow, or a part of it; xgrammar's own allow a 31st of June.
_FORMATS = {
    "date": _DAY,
    "time": _TIME,
    "date-time": f"{_DAY}T{_TIME}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,4}}",
    "email": rf"[A-Za-z0-9_+-]{{1,30}}(\.[A-Za-z0-9_+-]{{1,15}}){{0,2}}@{_LABEL}(\.{_LABEL}){{1,4}}",
    "uri": rf"https?://{_LABEL}(\.{_LABEL}){{0,3}}(:[1-9]\d{{0,3}})?(/[A-Za-z0-9_.~-]*)*(\?[A-Za-z0-9_.~=&-]*)?",
}
_OTHER_FORMATS = {
    "duration", "ipv6", "idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer",
    "relative-json-pointer", "regex",
}  # fmt: skip
_MOST_PATTERN = 2_048
_FIELD = "json_schema"


@dataclass(frozen=True)
class Enforced:
    """
    Attributes:
        schema: for xgrammar. A pattern `^NAME$` stands for the rule of that name.
        rules: NAME -> that rule, and those that it needs, in EBNF.
    """

    schema: dict[str, Any]
    rules: dict[str, str]


def normalise(schema: Any) -> Enforced:
    """The schema that is compiled.

    Raises:
        RequestError: what can't be enforced, and where.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(_FIELD, f"is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(_FIELD, "must be an object")
    try:
        size = len(json.dumps(schema))
    except (ValueError, TypeError, RecursionError):
        raise RequestError(_FIELD, "must be plain JSON that is not nested too deeply") from None
    if size > MOST_BYTES:
        raise RequestError(_FIELD, f"is larger than {MOST_BYTES:,} characters")
    normaliser = _Normaliser(schema)
    out = normaliser.node(schema, "#", 0)
    return Enforced(out, normaliser.rules)


class _Normaliser:
    """Of one schema.

    Args:
        root: that `$ref` points into.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._nodes = root, 0
        self._names: dict[str, str] = {}  # of patterns
        self.rules: dict[str, str] = {}  # of those names

    def node(self, schema: Any, at: str, depth: int) -> dict[str, Any]:
        """A schema in it, rewritten; `at`: where it stands."""
        self._nodes += 1
        if depth > MOST_DEPTH or self._nodes > MOST_NODES:
            raise RequestError(_FIELD, f"has more than {MOST_NODES:,} parts, or some deeper than {MOST_DEPTH}")
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            _refuse(at, "must be a schema, and not false, which nothing meets")
        for key, value in schema.items():
            harmless = (
                (key == "uniqueItems" and value is False)
                or (key == "multipleOf" and value == 1)
                or (key == "$id" and at == "#")
            )
            if key in _REFUSED and not harmless:
                _refuse(at, f"{key} can't be enforced")
        used = {key for key in schema if key in _KNOWN and key not in ("$defs", "definitions")}
        out = self._rule(schema, used, at, depth)
        for key in ("$defs", "definitions"):
            if key in schema:
                out[key] = self._each(schema[key], f"{at}/{key}", depth)
        return out

    def _rule(self, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        if "$ref" in used:
            _alone("$ref", used, at)
            return {"$ref": self._reference(schema["$ref"], at)}
        if "enum" in used or "const" in used:
            return self._values(schema, used, at)
        if "allOf" in used:
            _alone("allOf", used, at)
            if not isinstance(schema["allOf"], list) or len(schema["allOf"]) != 1:
                _refuse(at, "allOf can't be enforced with more than one schema; merge them")
            return self.node(schema["allOf"][0], f"{at}/allOf/0", depth + 1)
        for key in ("anyOf", "oneOf"):
            if key in used:
                return self._choice(key, schema, used, at, depth)
        return self._typed(schema, used, at, depth)

    def _reference(self, reference: Any, at: str) -> str:
        """Checked to lead to a schema within, and not only to other references."""
        seen = set()
        target: Any = {"$ref": reference}
        while isinstance(target, Mapping) and "$ref" in target:
            pointer = target["$ref"]
            if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
                _refuse(at, "$ref must point into the schema itself (#/...); nothing is fetched")
            if pointer in seen:
                _refuse(at, "$ref leads to itself")
            if "~" in pointer or "%" in pointer:
                _refuse(at, "$ref with ~ or % can't be followed; rename what it points to")
            seen.add(pointer)
            target = self._root
            for part in pointer.split("/")[1:]:
                if isinstance(target, Mapping) and part in target:
                    target = target[part]
                elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
                    target = target[int(part)]
                else:
                    _refuse(at, f"$ref {pointer} leads nowhere")
        return str(reference)

    def _values(self, schema: Mapping[str, Any], used: set[str], at: str) -> dict[str, Any]:
        _alone("enum", used - {"const", "type"}, at)
        values = schema["enum"] if "enum" in used else [schema["const"]]
        if not isinstance(values, list):
            _refuse(at, "enum must be a list")
        if "const" in used:
            values = [value for value in values if json.dumps(value) == json.dumps(schema["const"])]
        types = self._types(schema, at)
        values = [value for value in values if types is None or any(_is(value, name) for name in types)]
        if not values:
            _refuse(at, "enum, const and type leave no value")
        return {"enum": values}

    def _choice(self, key: str, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        """`anyOf` and `oneOf`. A type beside them goes into the branches."""
        _alone(key, used - {"type"}, at)
        branches = schema[key]
        if not isinstance(branches, list) or not branches:
            _refuse(at, f"{key} must be a list of schemas")
        if "type" in used:
            for branch in branches:
                if not isinstance(branch, Mapping) or branch.get("type", schema["type"]) != schema["type"] or "$ref" in branch:
                    _refuse(at, f"type beside {key} can't be enforced; write it in each branch")
            branches = [{**branch, "type": schema["type"]} for branch in branches]
        if key == "oneOf" and not self._disjoint(branches):
            _refuse(at, "oneOf can't be enforced where two branches may both hold; use anyOf")
        return {"anyOf": [self.node(branch, f"{at}/{key}/{i}", depth + 1) for i, branch in enumerate(branches)]}

    def _disjoint(self, branches: list[Any]) -> bool:
        """Whether no value meets two branches: by their types, or by a required property whose values differ."""
        found = [self._followed(branch) for branch in branches]
        return all(_differ(a, b) for i, a in enumerate(found) for b in found[:i])

    def _followed(self, schema: Any) -> Any:
        """What a reference leads to."""
        for _ in range(MOST_DEPTH):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            target: Any = self._root
            for part in schema["$ref"].split("/")[1:]:
                target = target.get(part) if isinstance(target, Mapping) else None
            schema = target
        return schema

    def _types(self, schema: Mapping[str, Any], at: str) -> list[str] | None:
        if "type" not in schema:
            return None
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not isinstance(types, list) or not types or any(name not in _TYPES for name in types):
            _refuse(at, f"type must be one of {', '.join(_TYPES)}, or a list of them")
        return [name for name in types if name != "integer" or "number" not in types]

    def _typed(self, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        types = self._types(schema, at)
        if types is None:
            types = [name for name, keys in _OF_TYPE.items() if used & keys and name != "integer"]
            if len(types) > 1:
                _refuse(at, "needs a type")
            if not types:
                return {}
        make = {
            "object": self._object,
            "array": self._array,
            "string": self._text,
            "integer": self._number,
            "number": self._number,
        }
        out = [make[name](schema, name, at, depth) if name in make else {"type": name} for name in types]
        return out[0] if len(out) == 1 else {"anyOf": out}

    def _object(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        properties = self._each(schema.get("properties", {}), f"{at}/properties", depth)
        more = schema.get("additionalProperties", not properties)
        required = schema.get("required", [])
        if not isinstance(required, list) or any(not isinstance(key, str) for key in required):
            _refuse(at, "required must be a list of names")
        out: dict[str, Any] = {"type": "object"}
        if more is not False:
            more = self.node(more, f"{at}/additionalProperties", depth + 1)
        for key in required:
            if key not in properties:
                if more is False:
                    _refuse(at, f"requires {key!r}, which properties do not have")
                properties[key] = more
        least, most = _count(schema, "minProperties", at), _count(schema, "maxProperties", at)
        if least is not None and least > len(set(required)):
            if more is not False:
                _refuse(at, "minProperties can't be enforced where names are free; name them as required")
            out["minProperties"] = least
        if most is not None:
            out["maxProperties"] = most
        if properties:
            out["properties"] = properties
        return {**out, "required": sorted(set(required), key=list(properties).index), "additionalProperties": more}

    def _array(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "array"}
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            _refuse(at, "prefixItems must be a list of schemas")
        if isinstance(schema.get("items"), list):
            _refuse(at, "items must be one schema; those of each place go into prefixItems")
        least, most = _count(schema, "minItems", at), _count(schema, "maxItems", at)
        more = schema.get("items", not prefix or (least or 0) > len(prefix))
        if prefix:
            out["prefixItems"] = [self.node(item, f"{at}/prefixItems/{i}", depth + 1) for i, item in enumerate(prefix)]
        out["items"] = more if more is False else self.node(more, f"{at}/items", depth + 1)
        if least is not None:
            out["minItems"] = least
        if most is not None:
            out["maxItems"] = most
        return out

    def _text(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "string"}
        least, most = _count(schema, "minLength", at) or None, _count(schema, "maxLength", at)
        shape = schema.get("format")
        if shape in _OTHER_FORMATS:
            _refuse(at, f"format {shape} can't be enforced")
        pattern = schema.get("pattern", f"^({_FORMATS[shape]})$" if isinstance(shape, str) and shape in _FORMATS else None)
        if "pattern" in schema and isinstance(shape, str) and shape in _FORMATS:
            _refuse(at, "pattern and format can't both be enforced")
        if pattern is not None:
            if least is not None or most is not None:
                _refuse(at, "minLength and maxLength can't be enforced beside pattern or format")
            if not isinstance(pattern, str) or len(pattern) > _MOST_PATTERN:
                _refuse(at, f"pattern must be a string of at most {_MOST_PATTERN:,} characters")
            try:
                return {**out, "pattern": self._placeholder(pattern)}
            except ValueError as error:
                _refuse(at, f"pattern: {error}")
        if least is not None:
            out["minLength"] = least
        if most is not None:
            out["maxLength"] = most
        return out

    def _placeholder(self, pattern: str) -> str:
        if pattern not in self._names:
            name = self._names[pattern] = f"DSO{len(self._names)}P"
            self.rules[name] = to_rules(pattern, name, json_string=True)
        return f"^{self._names[pattern]}$"

    def _number(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        bounds = {key: _bound(schema[key], key, at) for key in _OF_TYPE[name] if key in schema}
        if {"minimum", "exclusiveMinimum"} <= bounds.keys() or {"maximum", "exclusiveMaximum"} <= bounds.keys():
            _refuse(at, "one bound of a kind only, exclusive or not")
        return {"type": name, **(_whole(bounds) if name == "integer" else bounds)}

    def _each(self, schemas: Any, at: str, depth: int) -> dict[str, Any]:
        if not isinstance(schemas, Mapping):
            _refuse(at, "must be an object of schemas")
        return {key: self.node(schema, f"{at}/{key}", depth + 1) for key, schema in schemas.items()}


def _refuse(at: str, message: str) -> NoReturn:
    raise RequestError(_FIELD, f"{at}: {message}")


def _alone(key: str, used: set[str], at: str) -> None:
    others = used - {key}
    if others:
        _refuse(at, f"{', '.join(sorted(others))} beside {key} can't be enforced")


def _is(value: Any, name: str) -> bool:
    """Whether a value has a type of JSON schema."""
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return name == "number" or (name == "integer" and float(value).is_integer())
    return name == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _differ(a: Any, b: Any) -> bool:
    """Whether no value meets both schemas, as far as can be seen."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return False
    if not _type_names(a) & _type_names(b):
        return True
    shared = (
        set(a.get("required") or ()) & set(b.get("required") or ()) if _type_names(a) == _type_names(b) == {"object"} else set()
    )
    for key in shared:
        values = [_listed(schema.get("properties", {}).get(key)) for schema in (a, b)]
        if None not in values and not values[0] & values[1]:
            return True
    return False


def _type_names(schema: Mapping[str, Any]) -> set[str]:
    """Types that a schema's values may have."""
    if isinstance(schema.get("enum"), list) or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return {name for value in values for name in _TYPES if _is(value, name)}
    types = schema.get("type", list(_TYPES))
    names = set(types if isinstance(types, list) else [types])
    return names | {"integer"} if "number" in names else names


def _listed(schema: Any) -> Any:
    """The values of an enum or a const as a set of JSON texts; None of other schemas."""
    if not isinstance(schema, Mapping) or not ("const" in schema or isinstance(schema.get("enum"), list)):
        return None
    return {json.dumps(value) for value in (schema["enum"] if "enum" in schema else [schema["const"]])}


def _count(schema: Mapping[str, Any], key: str, at: str) -> int | None:
    value = schema.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_LENGTH):
        _refuse(at, f"{key} must be an integer from 0 to {MOST_LENGTH}")
    return value


def _bound(value: Any, key: str, at: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _refuse(at, f"{key} must be a number")
    return value


def _whole(bounds: Mapping[str, int | float]) -> dict[str, int]:
    """Bounds of integers, as integers that are allowed themselves."""
    out = {}
    for key, value in bounds.items():
        if key == "minimum":
            out["minimum"] = math.ceil(value)
        elif key == "exclusiveMinimum":
            out["minimum"] = math.floor(value) + 1
        elif key == "maximum":
            out["maximum"] = math.floor(value)
        else:
            out["maximum"] = math.ceil(value) - 1
    return out
