"""JSON schemas made ready for xgrammar, so that every text of the grammar is valid under the schema.

xgrammar leaves keywords out in silence that it can't express. Here each keyword is known: it is enforced, it is rewritten into
one that is, it is an annotation and dropped, or the schema is refused. Where a schema leaves open what else may come, the
grammar takes less: objects with `properties` have no others unless `additionalProperties` says so.
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
_MAX_EXCLUSIVE = 256  # branches of one oneOf, which are compared with one another
_INDEX = re.compile(r"[0-9]{1,6}")  # into a list, in a reference
_MAX_NESTING = 4 * MAX_DEPTH  # of lists and objects, values of enum and const among them
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
            raise RequestError(FIELD, f"is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(FIELD, "must be an object")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise RequestError(FIELD, "must be plain JSON that is not nested too deeply") from None
    if len(text) > MAX_BYTES:
        raise RequestError(FIELD, f"is larger than {MAX_BYTES:,} characters")
    schema = json.loads(text)  # of plain lists and objects, whose keys are strings
    if _deeper(schema, _MAX_NESTING):
        raise RequestError(FIELD, f"nests lists and objects more than {_MAX_NESTING} deep")
    normaliser = _Normaliser(schema)
    return Enforced(normaliser.whole(), normaliser.rules)


class _Normaliser:
    """Of one schema.

    What a reference leads to is rewritten like the rest, wherever it stands, and put into `$defs` under a name of its own: a
    place that the schema doesn't have as a schema (a value of an enum, say) would otherwise be followed as it was written.

    Args:
        root: that `$ref` points into: plain JSON.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._nodes = root, 0
        self._names: dict[str, str] = {}  # of patterns
        self.rules: dict[str, str] = {}  # of those names
        self._shared: dict[int, str] = {}  # names in `$defs`, by the identity of what stands there
        self._targets: list[tuple[Any, str]] = []  # of those names: what is to be rewritten, and where it stands
        self._exclusive: list[tuple[list[Any], str]] = []  # branches of oneOf, and where: judged once all of them are checked

    def whole(self) -> dict[str, Any]:
        out = self.node(self._root, "#", 0)
        shared = [self.node(target, at, 0) for target, at in self._targets]  # grows: one may refer to others
        for branches, at in self._exclusive:
            if not disjoint([self._followed(branch) for branch in branches]):
                refuse(at, "oneOf can't be enforced where two branches may both hold; use anyOf")
        if shared:
            out["$defs"] = dict(zip(self._shared.values(), shared, strict=True))
        return out

    def _share(self, target: Any, at: str) -> str:
        """The name in `$defs` of a part of the schema."""
        if id(target) not in self._shared:
            self._shared[id(target)] = f"r{len(self._shared)}"
            self._targets.append((target, at))
        return self._shared[id(target)]

    def node(self, schema: Any, at: str, depth: int) -> dict[str, Any]:
        """A schema in it, rewritten; `at`: where it stands."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise RequestError(FIELD, f"has more than {MAX_NODES:,} parts, or some deeper than {MAX_DEPTH}")
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            refuse(at, "must be a schema, and not false, which nothing meets")
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
        """To the same in `$defs`; checked to lead to a schema within, and not only to other references."""
        seen = set()
        pointer, target = reference, self._target(reference, at)
        while isinstance(target, dict) and isinstance(target.get("$ref"), str):
            if pointer in seen:
                refuse(at, "$ref leads to itself")
            seen.add(pointer)
            pointer = target["$ref"]
            target = self._target(pointer, at)
        if not isinstance(target, (dict, bool)):
            refuse(at, f"$ref {excerpt(pointer)} leads to what is no schema")
        return f"#/$defs/{self._share(self._target(reference, at), reference)}"

    def _target(self, pointer: str, at: str) -> Any:
        """What a reference points to."""
        if not (pointer == "#" or pointer.startswith("#/")):
            refuse(at, "$ref must point into the schema itself (#/...); nothing is fetched")
        if "~" in pointer or "%" in pointer:
            refuse(at, "$ref with ~ or % can't be followed; rename what it points to")
        target = self._root
        for part in pointer.split("/")[1:]:
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and _INDEX.fullmatch(part) and int(part) < len(target):
                target = target[int(part)]
            else:
                refuse(at, f"$ref {excerpt(pointer)} leads nowhere")
        return target

    def _followed(self, schema: Any) -> Any:
        """What references lead to, which are known to end."""
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
            refuse(at, "enum, const and type leave no value")
        return {"enum": values}

    def _choice(self, key: str, schema: Mapping[str, Any], used: set[str], at: str, depth: int) -> dict[str, Any]:
        """`anyOf` and `oneOf`. A type beside them goes into the branches."""
        _alone(key, used - {"type"}, at)
        branches = schema[key]
        if key == "oneOf" and len(branches) > _MAX_EXCLUSIVE:
            refuse(at, f"oneOf can't be enforced with more than {_MAX_EXCLUSIVE} branches; use anyOf")
        if "type" in used:
            for branch in branches:
                if not isinstance(branch, dict) or branch.get("type", schema["type"]) != schema["type"] or "$ref" in branch:
                    refuse(at, f"type beside {key} can't be enforced; write it in each branch")
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
                    refuse(at, f"requires {shown(key)}, which properties do not have")
                properties[key] = more
        least, most = schema.get("minProperties"), schema.get("maxProperties")
        if least is not None and least > len(set(required)):
            if more is not False:
                refuse(at, "minProperties can't be enforced where names are free; name them as required")
            out["minProperties"] = least
        if most is not None:
            out["maxProperties"] = most
        if properties:
            out["properties"] = properties
        return {**out, "required": sorted(set(required), key=list(properties).index), "additionalProperties": more}

    def _array(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "array"}
        prefix = schema.get("prefixItems", [])
        least, most = schema.get("minItems"), schema.get("maxItems")
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
        least, most = schema.get("minLength") or None, schema.get("maxLength")
        shape = schema.get("format")
        if shape in _OTHER_FORMATS:
            refuse(at, f"format {shape} can't be enforced")
        pattern = schema.get("pattern", f"^({_FORMATS[shape]})$" if shape in _FORMATS else None)
        if "pattern" in schema and shape in _FORMATS:
            refuse(at, "pattern and format can't both be enforced")
        if pattern is not None:
            if least is not None or most is not None:
                refuse(at, "minLength and maxLength can't be enforced beside pattern or format")
            try:
                return {**out, "pattern": self._placeholder(pattern)}
            except ValueError as error:
                refuse(at, f"pattern: {error}")
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
        bounds = {key: schema[key] for key in _OF_TYPE[name] if key in schema}
        if {"minimum", "exclusiveMinimum"} <= bounds.keys() or {"maximum", "exclusiveMaximum"} <= bounds.keys():
            refuse(at, "one bound of a kind only, exclusive or not")
        return {"type": name, **(_whole(bounds) if name == "integer" else bounds)}

    def _each(self, schemas: Mapping[str, Any], at: str, depth: int) -> dict[str, Any]:
        return {key: self.node(schema, f"{at}/{key}", depth + 1) for key, schema in schemas.items()}


def _alone(key: str, used: set[str], at: str) -> None:
    others = used - {key}
    if others:
        refuse(at, f"{', '.join(sorted(others))} beside {key} can't be enforced")


def _types(schema: Mapping[str, Any]) -> list[str] | None:
    if "type" not in schema:
        return None
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return [name for name in types if name != "integer" or "number" not in types]


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects nest deeper. Level by level, so that no depth can exhaust the stack."""
    level = [value]
    for _ in range(most + 1):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if not level:
            return False
    return True


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
