"""Prepares JSON schemas for xgrammar, so that every text that the grammar allows is valid under the schema.

xgrammar silently ignores keywords that it does not support. Here every keyword is enforced, rewritten into one that is,
dropped as an annotation, or refused. Where a schema is open, the grammar allows less: objects with `properties` have no others
unless `additionalProperties` is given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RequestError, excerpt, shown
from .pattern import to_rules
from .schema_overlap import canonical, disjoint, is_of_type
from .schema_shapes import FIELD, check_shapes, refuse

MAX_DEPTH, MAX_NODES, MAX_BYTES = 32, 4_000, 1 << 18
_MAX_EXCLUSIVE = 256  # maximum number of branches of a oneOf, which are compared in pairs
_INDEX = re.compile(r"[0-9]{1,6}")  # index into a list, in a reference
_MAX_NESTING = 4 * MAX_DEPTH  # maximum depth of lists and objects, including values of enum and const
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
# Patterns that match these formats or a subset of them; xgrammar's own patterns allow June 31.
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


@dataclass(frozen=True)
class Enforced:
    """A schema of which every keyword is enforced.

    Attributes:
        schema: schema for xgrammar. A pattern `^NAME$` stands for the rule NAME.
        rules: NAME -> the rule and those that it needs, in EBNF.
    """

    schema: dict[str, Any]
    rules: dict[str, str]


def normalize(schema: Any) -> Enforced:
    """Checks a JSON schema and rewrites it for xgrammar.

    Args:
        schema: a schema as JSON text or as parsed JSON.

    Raises:
        RequestError: the schema is invalid, too large, or has a keyword that cannot be enforced; names the place.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(FIELD, f"is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(FIELD, "must be an object")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise RequestError(FIELD, "must be plain JSON that is not nested too deeply") from None
    if len(text) > MAX_BYTES:
        raise RequestError(FIELD, f"is larger than {MAX_BYTES:,} characters")
    schema = json.loads(text)  # has only plain lists, and objects with string keys
    if _deeper(schema, _MAX_NESTING):
        raise RequestError(FIELD, f"nests lists and objects more than {_MAX_NESTING} levels deep")
    normalizer = _Normalizer(schema)
    return Enforced(normalizer.whole(), normalizer.rules)


class _Normalizer:
    """Rewrites one schema.

    Targets of references are rewritten wherever they are, and put into `$defs` under new names. Otherwise xgrammar would follow
    a reference to a place that is not rewritten, such as a value of an enum.

    Args:
        root: the whole schema, which `$ref` points into, as plain JSON.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._nodes = root, 0
        self._names: dict[str, str] = {}  # pattern -> rule name
        self.rules: dict[str, str] = {}  # rule name -> rules
        self._shared: dict[int, str] = {}  # id of a reference's target -> its name in `$defs`
        self._targets: list[tuple[Any, str]] = []  # the targets with their JSON pointers, in the order of the names
        self._exclusive: list[tuple[list[Any], str]] = []  # branches of each oneOf, JSON pointer; compared at the end

    def whole(self) -> dict[str, Any]:
        out = self.node(self._root, "#", 0)
        shared = [self.node(target, at, 0) for target, at in self._targets]  # grows meanwhile: targets may refer to others
        for branches, at in self._exclusive:
            if not disjoint([self._followed(branch) for branch in branches]):
                refuse(at, "oneOf can't be enforced if two branches may both be valid; use anyOf")
        if shared:
            out["$defs"] = dict(zip(self._shared.values(), shared, strict=True))
        return out

    def _share(self, target: Any, at: str) -> str:
        """Returns the name in `$defs` of a part of the schema."""
        if id(target) not in self._shared:
            self._shared[id(target)] = f"r{len(self._shared)}"
            self._targets.append((target, at))
        return self._shared[id(target)]

    def node(self, schema: Any, at: str, depth: int) -> dict[str, Any]:
        """Rewrites a part of the schema; `at` is its JSON pointer."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise RequestError(FIELD, f"has more than {MAX_NODES:,} parts, or is more than {MAX_DEPTH} levels deep")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            refuse(at, "must be a schema other than false, under which no value is valid")
        if isinstance(schema.get("items"), list) and "prefixItems" not in schema:  # its name before draft 2020-12
            schema = {("prefixItems" if key == "items" else key): value for key, value in schema.items()}
        for key, value in schema.items():
            harmless = (
                (key == "uniqueItems" and value is False)
                or (key == "multipleOf" and value == 1)
                or (key == "$id" and at == "#")
            )
            if key in _REFUSED and not harmless:
                refuse(at, f"{key} can't be enforced")
        check_shapes(schema, at)
        for key in ("$defs", "definitions"):
            for name, target in schema.get(key, {}).items():
                self._share(target, f"{at}/{key}/{name}")
        used = {key for key in schema if key in _KNOWN and key not in ("$defs", "definitions")}
        return self._rule(schema, used, at, depth)

    def _rule(self, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        if "$ref" in used:
            _alone("$ref", used, at)
            return {"$ref": self._reference(schema["$ref"], at)}
        if "enum" in used or "const" in used:
            return self._values(schema, used, at)
        if "allOf" in used:
            _alone("allOf", used, at)
            if len(schema["allOf"]) != 1:
                refuse(at, "allOf can't be enforced with more than one schema; merge them")
            return self.node(schema["allOf"][0], f"{at}/allOf/0", depth + 1)
        for key in ("anyOf", "oneOf"):
            if key in used:
                return self._choice(key, schema, used, at, depth)
        return self._typed(schema, used, at, depth)

    def _reference(self, reference: str, at: str) -> str:
        """Returns the reference into `$defs` for a reference; checks that it ends at a schema, not in a cycle of references."""
        seen = set()
        pointer, target = reference, self._target(reference, at)
        while isinstance(target, dict) and isinstance(target.get("$ref"), str):
            if pointer in seen:
                refuse(at, "$ref refers to itself")
            seen.add(pointer)
            pointer = target["$ref"]
            target = self._target(pointer, at)
        if not isinstance(target, (dict, bool)):
            refuse(at, f"$ref {excerpt(pointer)} does not refer to a schema")
        return f"#/$defs/{self._share(self._target(reference, at), reference)}"

    def _target(self, pointer: str, at: str) -> Any:
        """Returns the target of a reference."""
        if not (pointer == "#" or pointer.startswith("#/")):
            refuse(at, "$ref must refer to a part of this schema (#/...); nothing is fetched")
        if "~" in pointer or "%" in pointer:
            refuse(at, "$ref with ~ or % is not supported; rename its target")
        target = self._root
        for part in pointer.split("/")[1:]:
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and _INDEX.fullmatch(part) and int(part) < len(target):
                target = target[int(part)]
            else:
                refuse(at, f"$ref {excerpt(pointer)} does not exist")
        return target

    def _followed(self, schema: Any) -> Any:
        """Follows references, which have been checked to end."""
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._target(schema["$ref"], "#")
        return schema

    def _values(self, schema: Mapping[str, Any], used: set[str], at: str) -> dict[str, Any]:
        _alone("enum", used - {"const", "type"}, at)
        values = schema["enum"] if "enum" in used else [schema["const"]]
        if "const" in used:
            values = [value for value in values if canonical(value) == canonical(schema["const"])]
        types = _types(schema)
        values = [value for value in values if types is None or any(is_of_type(value, name) for name in types)]
        if not values:
            refuse(at, "enum, const and type allow no value")
        return {"enum": values}

    def _choice(self, key: str, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        """Rewrites `anyOf` or `oneOf`. A type next to it is moved into the branches."""
        _alone(key, used - {"type"}, at)
        branches = schema[key]
        if key == "oneOf" and len(branches) > _MAX_EXCLUSIVE:
            refuse(at, f"oneOf can't be enforced with more than {_MAX_EXCLUSIVE} branches; use anyOf")
        if "type" in used:
            for branch in branches:
                if not isinstance(branch, dict) or branch.get("type", schema["type"]) != schema["type"] or "$ref" in branch:
                    refuse(at, f"type together with {key} can't be enforced; write it in each branch")
            branches = [{**branch, "type": schema["type"]} for branch in branches]
        if key == "oneOf":
            self._exclusive.append((branches, at))
        return {"anyOf": [self.node(branch, f"{at}/{key}/{i}", depth + 1) for i, branch in enumerate(branches)]}

    def _typed(self, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        types = _types(schema)
        if types is None:
            types = [name for name, keys in _OF_TYPE.items() if used & keys and name != "integer"]
            if len(types) > 1:
                refuse(at, "needs a type")
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
        out: dict[str, Any] = {"type": "object"}
        if more is not False:
            more = self.node(more, f"{at}/additionalProperties", depth + 1)
        for key in required:
            if key not in properties:
                if more is False:
                    refuse(at, f"requires {shown(key)}, which is not in properties")
                properties[key] = more
        minimum, maximum = schema.get("minProperties"), schema.get("maxProperties")
        if minimum is not None and minimum > len(set(required)):
            if more is not False:
                refuse(at, "minProperties can't be enforced for arbitrary names; list the names in required")
            out["minProperties"] = minimum
        if maximum is not None:
            out["maxProperties"] = maximum
        if properties:
            out["properties"] = properties
        return {**out, "required": sorted(set(required), key=list(properties).index), "additionalProperties": more}

    def _array(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "array"}
        prefix = schema.get("prefixItems", [])
        minimum, maximum = schema.get("minItems"), schema.get("maxItems")
        more = schema.get("items", not prefix or (minimum or 0) > len(prefix))
        if prefix:
            out["prefixItems"] = [self.node(item, f"{at}/prefixItems/{i}", depth + 1) for i, item in enumerate(prefix)]
        out["items"] = more if more is False else self.node(more, f"{at}/items", depth + 1)
        if minimum is not None:
            out["minItems"] = minimum
        if maximum is not None:
            out["maxItems"] = maximum
        return out

    def _text(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "string"}
        minimum, maximum = schema.get("minLength") or None, schema.get("maxLength")
        shape = schema.get("format")
        if shape in _OTHER_FORMATS:
            refuse(at, f"format {shape} can't be enforced")
        pattern = schema.get("pattern", f"^({_FORMATS[shape]})$" if shape in _FORMATS else None)
        if "pattern" in schema and shape in _FORMATS:
            refuse(at, "pattern and format can't both be enforced")
        if pattern is not None:
            if minimum is not None or maximum is not None:
                refuse(at, "minLength and maxLength can't be enforced together with pattern or format")
            try:
                return {**out, "pattern": self._placeholder(pattern)}
            except ValueError as error:
                refuse(at, f"pattern: {error}")
        if minimum is not None:
            out["minLength"] = minimum
        if maximum is not None:
            out["maxLength"] = maximum
        return out

    def _placeholder(self, pattern: str) -> str:
        if pattern not in self._names:
            name = self._names[pattern] = f"DSO{len(self._names)}P"
            self.rules[name] = to_rules(pattern, name, json_string=True)
        return f"^{self._names[pattern]}$"

    def _number(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        bounds = {key: schema[key] for key in _OF_TYPE[name] if key in schema}
        if {"minimum", "exclusiveMinimum"} <= bounds.keys() or {"maximum", "exclusiveMaximum"} <= bounds.keys():
            refuse(at, "a bound and its exclusive form can't both be given; use one bound")
        return {"type": name, **(_whole(bounds) if name == "integer" else bounds)}

    def _each(self, schemas: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        return {key: self.node(schema, f"{at}/{key}", depth + 1) for key, schema in schemas.items()}


def _alone(key: str, used: set[str], at: str) -> None:
    others = used - {key}
    if others:
        refuse(at, f"{', '.join(sorted(others))} together with {key} can't be enforced")


def _types(schema: Mapping[str, Any]) -> list[str] | None:
    if "type" not in schema:
        return None
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return [name for name in types if name != "integer" or "number" not in types]


def _deeper(value: Any, max_depth: int) -> bool:
    """Whether lists and objects are nested more than `max_depth` levels. Not recursive, so that no depth exhausts the stack."""
    level = [value]
    for _ in range(max_depth + 1):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if not level:
            return False
    return True


def _whole(bounds: Mapping[str, int | float]) -> dict[str, int]:
    """Converts bounds of integers to inclusive integer bounds."""
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
