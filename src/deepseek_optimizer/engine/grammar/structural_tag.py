"""Sources of grammars from structural tags: text of which parts have given formats.

Structural tags are xgrammar's; vLLM and SGLang accept them as a response format. Here they are checked and rewritten: schemas
and regular expressions in them become grammars, as everywhere else. Formats of single tokens are not supported, nor are
schemas in other notations than JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, NoReturn

from ...errors import RequestError, excerpt, shown
from .json_schema import normalize
from .pattern import to_rules
from .source import GrammarSource, checked_source

FIELD = "structural_tag"
_MAX_CHARACTERS = 1 << 18  # of the whole tag as JSON
_MAX_DEPTH, _MAX_FORMATS = 16, 1_000  # nesting depth and number of formats
_MAX_REPEATS = 1_000


def structural_tag_source(tag: Mapping[str, Any] | str) -> GrammarSource:
    """Returns the source for text that follows a structural tag.

    Args:
        tag: {"format": FORMAT}, or the older form {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, or one of
            them as JSON text.

    Raises:
        RequestError: the tag is invalid or too large, or has a format that is not supported; names the place.
    """
    if isinstance(tag, str):
        try:
            tag = json.loads(tag)
        except (ValueError, RecursionError):
            raise RequestError(FIELD, "is not valid JSON") from None
    if not isinstance(tag, Mapping):
        raise RequestError(FIELD, "must be an object")
    try:
        size = len(json.dumps(tag, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        raise RequestError(FIELD, "must be plain JSON that is not nested too deeply") from None
    if size > _MAX_CHARACTERS:
        raise RequestError(FIELD, f"is larger than {_MAX_CHARACTERS:,} characters")
    form = _of_structures(tag) if "structures" in tag else tag.get("format")
    structure = {"type": "structural_tag", "format": _Rewriter().format(form, "format", 0)}
    return checked_source("structure", json.dumps(structure), FIELD)


def _of_structures(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a tag in the older form."""
    structures, tags = tag["structures"], []
    if not isinstance(structures, list) or not all(isinstance(one, Mapping) for one in structures):
        raise RequestError(FIELD, "structures: must be a list of objects with begin, schema and end")
    for one in structures:
        schema = {"type": "json_schema", "json_schema": one.get("schema", {})}
        tags.append({"type": "tag", "begin": one.get("begin"), "content": schema, "end": one.get("end")})
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


class _Field(NamedTuple):
    """A field of a format: the name of the method of `_Rewriter` that checks it, and whether it is required."""

    kind: str
    required: bool = True


_TAGS = {"tags": _Field("tags"), "at_least_one": _Field("flag", False), "stop_after_first": _Field("flag", False)}
_CONTENT = {"content": _Field("format")}
_FORMATS: dict[str, dict[str, _Field]] = {
    "const_string": {"value": _Field("text")},
    "any_text": {"excludes": _Field("texts", False)},
    "json_schema": {"json_schema": _Field("schema"), "style": _Field("style", False)},
    "regex": {"pattern": _Field("pattern")},
    "grammar": {"grammar": _Field("text")},
    "sequence": {"elements": _Field("formats")},
    "or": {"elements": _Field("formats")},
    "optional": _CONTENT,
    "plus": _CONTENT,
    "star": _CONTENT,
    "repeat": {**_CONTENT, "min": _Field("count"), "max": _Field("count")},
    "tag": {**_CONTENT, "begin": _Field("text"), "end": _Field("ends")},
    "triggered_tags": {**_TAGS, "triggers": _Field("texts"), "excludes": _Field("texts", False)},
    "tags_with_separator": {**_TAGS, "separator": _Field("string")},
}


class _Rewriter:
    """Checks the formats of one tag and rewrites them; the methods take a value, its place, and its depth."""

    def __init__(self) -> None:
        self._formats = 0

    def format(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        self._formats += 1
        if depth > _MAX_DEPTH or self._formats > _MAX_FORMATS:
            _refuse(at, f"the tag has more than {_MAX_FORMATS:,} formats, or nests them more than {_MAX_DEPTH} deep")
        if not isinstance(value, Mapping):
            _refuse(at, "must be an object with a type")
        kind = value.get("type")
        known = _FORMATS.get(kind) if isinstance(kind, str) else None
        if known is None:
            _refuse(at, f"{shown(kind)} is not a supported format; use one of {', '.join(_FORMATS)}")
        for name in value:
            if name not in known and name != "type":
                _refuse(f"{at}.{excerpt(str(name))}", f"is not supported for {kind}; leave it out")
        rewritten: dict[str, Any] = {"type": kind}
        for name, field in known.items():
            if name in value:
                check: Callable[[Any, str, int], Any] = getattr(self, field.kind)
                rewritten[name] = check(value[name], f"{at}.{name}", depth + 1)
            elif field.required:
                _refuse(f"{at}.{name}", "is missing")
        if kind == "json_schema":
            return dict(rewritten["json_schema"])
        return {"type": "grammar", "grammar": rewritten["pattern"]} if kind == "regex" else rewritten

    def formats(self, value: Any, at: str, depth: int) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            _refuse(at, "must be a list of formats")
        return [self.format(one, f"{at}.{i}", depth) for i, one in enumerate(value)]

    def tags(self, value: Any, at: str, depth: int) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            _refuse(at, "must be a list of tags")
        return self.formats([{**one, "type": "tag"} for one in value], at, depth)

    def schema(self, value: Any, at: str, depth: int) -> dict[str, Any]:
        try:
            return asdict(normalize(value))
        except RequestError as error:
            _refuse(at, str(error).partition(": ")[2])

    def pattern(self, value: Any, at: str, depth: int) -> str:
        try:
            return to_rules(self.text(value, at, depth), "root", json_string=False)
        except ValueError as error:
            _refuse(at, str(error))

    def style(self, value: Any, at: str, depth: int) -> str:
        if value != "json":
            _refuse(at, 'must be "json"; schemas in other notations are not supported')
        return "json"

    def string(self, value: Any, at: str, depth: int) -> str:
        if not isinstance(value, str):
            _refuse(at, "must be a string")
        return value

    def text(self, value: Any, at: str, depth: int) -> str:
        if not isinstance(value, str) or not value:
            _refuse(at, "must be a string of at least one character")
        return value

    def texts(self, value: Any, at: str, depth: int) -> list[str]:
        if not isinstance(value, list):
            _refuse(at, "must be a list of strings")
        return [self.text(one, f"{at}.{i}", depth) for i, one in enumerate(value)]

    def ends(self, value: Any, at: str, depth: int) -> str | list[str]:
        return self.texts(value, at, depth) if isinstance(value, list) else self.string(value, at, depth)

    def flag(self, value: Any, at: str, depth: int) -> bool:
        if not isinstance(value, bool):
            _refuse(at, "must be true or false")
        return value

    def count(self, value: Any, at: str, depth: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= _MAX_REPEATS:
            _refuse(at, f"must be an integer from 0 to {_MAX_REPEATS:,}, or for max -1, which means no maximum")
        return value


def _refuse(at: str, reason: str) -> NoReturn:
    raise RequestError(FIELD, f"{at}: {reason}")
