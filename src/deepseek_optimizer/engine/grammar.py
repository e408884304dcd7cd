"""Grammars that an answer must keep to, by xgrammar: JSON, JSON schemas, regular expressions, EBNF, calls of tools.

They come from clients, so they are compiled in a process of its own, with limits (see `worker`), and cached. A grammar that
can't be compiled, takes too long or would slow down each step is refused with the reason.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RequestError, excerpt, shown
from .json_schema import Enforced, normalise
from .pattern import to_rules
from .request import CompiledGrammar, Grammar
from .thoughts import AfterThoughts
from .worker import JobError, Worker, WorkerError

_JOB = Path(__file__).with_name("grammar_job.py")
_MOST_BYTES = 1 << 25  # of a compiled grammar
_MOST_SOURCE = {"regex": 8_192, "ebnf": 1 << 16}  # characters
_CACHED, _CACHED_BYTES = 256, 1 << 27  # compiled grammars kept at most


@dataclass(frozen=True)
class CallShape:
    """How a model writes calls of tools: `begin (before NAME between ARGUMENTS after, separator between them) end`."""

    before: str
    between: str
    after: str
    separator: str = ""
    begin: str = ""
    end: str = ""


class GrammarCompiler:
    """Makes grammars for one model. Methods block, at most for as long as a job may take, and may be called by many threads.

    Args:
        tokenizer: of Transformers.
        vocab_size: of the model's logits: it may have more than the tokenizer has tokens, and those are never allowed.
        stop_token_ids: that end a text, beside the tokenizer's end of text.
        seconds: of CPU time that compiling one may take. A string of a bounded length of 128 or more takes one or two of them,
            the others of a schema milliseconds.
        memory: bytes that it may take.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        stop_token_ids: Iterable[int] = (),
        seconds: float = 10.0,
        memory: int = 1 << 30,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        own = tokenizer.eos_token_id
        self._stops = sorted({*stop_token_ids, *([] if own is None else [own])})
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._info: Any = None
        self._worker: Worker | None = None
        self._closed = False
        self._cache: OrderedDict[tuple[str, str], _Compiled | RequestError] = OrderedDict()

    def json_object(self) -> CompiledGrammar:
        """Any JSON object."""
        return self._compile("json_object", "", "response_format")

    def json_schema(self, schema: Mapping[str, Any] | str) -> CompiledGrammar:
        """JSON that is valid under a schema. Of what it leaves open, the grammar may allow less.

        Raises:
            RequestError: the schema is wrong, has what can't be enforced, or can't be compiled within the limits.
            EngineBusyError: others' grammars took all the time that one waits for them.
        """
        return self._compile("json_schema", json.dumps(asdict(normalise(schema))), "json_schema")

    def regex(self, pattern: str) -> CompiledGrammar:
        """Text that a regular expression matches from beginning to end; errors as of `json_schema`."""
        most = _MOST_SOURCE["regex"]
        if not isinstance(pattern, str) or not 0 < len(pattern) <= most:
            raise RequestError("regex", f"must be a string of 1 to {most} characters")
        try:
            rules = to_rules(pattern, "root", json_string=False)
        except ValueError as error:
            raise RequestError("regex", str(error)) from None
        return self._compile("ebnf", rules, "regex")

    def ebnf(self, text: str) -> CompiledGrammar:
        """Text of a grammar in GBNF, llama.cpp's notation, whose first rule is `root`; errors as of `json_schema`."""
        if not isinstance(text, str) or not 0 < len(text) <= _MOST_SOURCE["ebnf"]:
            raise RequestError("grammar", f"must be a string of 1 to {_MOST_SOURCE['ebnf']} characters")
        return self._compile("ebnf", text, "grammar")

    def tools(
        self, tools: Sequence[Mapping[str, Any]], choice: str, shape: CallShape, parallel: bool = True
    ) -> CompiledGrammar | None:
        """Calls whose arguments are valid under the tools' schemas, and nothing else.

        Args:
            tools: as OpenAI's API has them.
            choice: "required" for a call of any of them, or the name of the one to call. With "auto" and "none" nothing can be
                asked of the text, and there is no grammar.
            shape: how the model writes calls.
            parallel: whether there may be several.

        Raises:
            RequestError: as of `json_schema`, or there is no tool to call.
            EngineBusyError: as of `json_schema`.
        """
        if choice in ("auto", "none"):
            return None
        functions = [tool["function"] for tool in tools if choice in ("required", tool["function"]["name"])]
        if not functions:
            raise RequestError(
                "tool_choice", f"there is no tool {shown(choice)}" if tools else "there are no tools to call"
            )
        calls = [  # as xgrammar's structural tags, but for the contents, which the job makes into grammars
            {
                "type": "tag",
                "begin": f"{shape.before}{function['name']}{shape.between}",
                "content": asdict(_parameters(function)),
                "end": shape.after,
            }
            for function in functions
        ]
        several = {
            "type": "tags_with_separator",
            "tags": calls,
            "separator": shape.separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        around = [{"type": "const_string", "value": text} for text in (shape.begin, shape.end)]
        parts = [part for part in (around[0], several, around[1]) if part.get("value") != ""]
        structure = {"type": "structural_tag", "format": {"type": "sequence", "elements": parts}}
        return self._compile("structure", json.dumps(structure), "tools")

    def after_thoughts(self, grammar: CompiledGrammar, open_tag: str, close_tag: str, opened: bool) -> CompiledGrammar:
        """A grammar for a model that thinks first: it begins behind the thoughts, which are free.

        Args:
            grammar: of what follows them.
            open_tag, close_tag: around thoughts, each one token.
            opened: the prompt ends with the first; otherwise the model may begin with it, or not think.

        Raises:
            RequestError: the tokenizer has no such token.
        """
        ids = [self._tokenizer.convert_tokens_to_ids(tag) for tag in (open_tag, close_tag)]
        if any(i is None or i == self._tokenizer.unk_token_id for i in ids):
            raise RequestError(
                "response_format", f"this model's tokenizer has no token {close_tag}, so its thoughts have no end"
            )
        return AfterThoughts(grammar, None if opened else ids[0], ids[1], self._stops)

    def close(self) -> None:
        """Ends the process; what was compiled stays usable."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _compile(self, kind: str, source: str, field: str) -> CompiledGrammar:
        if "\0" in source or any("\ud800" <= character <= "\udfff" for character in source):
            raise RequestError(field, "has a NUL or half of a surrogate pair")
        key = kind, source
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            found = self._make(kind, source, field)
            self._keep(key, found)
        if isinstance(found, RequestError):
            raise RequestError(found.field, str(found).partition(": ")[2])
        return found

    def _make(self, kind: str, source: str, field: str) -> _Compiled | RequestError:
        worker = self._started()
        try:
            text = worker.call({"kind": kind, "source": source})
        except JobError as error:
            return RequestError(field, str(error))
        except WorkerError as error:  # not kept: it may have been the machine
            raise RequestError(field, str(error)) from None
        import xgrammar

        return _Compiled(xgrammar.CompiledGrammar.deserialize_json(text, self._info), self._vocab_size, self._stops)

    def _keep(self, key: tuple[str, str], found: _Compiled | RequestError) -> None:
        with self._lock:
            self._cache[key] = found
            size = sum(_size(source, value) for (_, source), value in self._cache.items())
            while len(self._cache) > _CACHED or (size > _CACHED_BYTES and len(self._cache) > 1):
                (_, source), oldest = self._cache.popitem(last=False)
                size -= _size(source, oldest)

    def _started(self) -> Worker:
        with self._lock:
            if self._closed:
                raise RequestError("grammar", "the server is ending")
            if self._worker is None:
                self._info = _tokenizer_info(self._tokenizer, self._vocab_size, self._stops)
                setup = {"tokenizer": self._info.serialize_json(), "most": _MOST_BYTES}
                self._worker = Worker(_JOB, setup, seconds=self._seconds, memory=self._memory, patience=2 * self._seconds)
            return self._worker


class _Compiled:
    """See `CompiledGrammar`.

    Args:
        compiled: xgrammar's.
        vocab_size: of the model.
        stops: tokens that end a text.
    """

    def __init__(self, compiled: Any, vocab_size: int, stops: Sequence[int]) -> None:
        self.compiled = compiled
        self._stops = np.zeros(-(-vocab_size // 32), np.int32)
        for token in stops:
            self._stops.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def start(self) -> Grammar:
        import xgrammar

        return _State(xgrammar.GrammarMatcher(self.compiled), self._stops)


class _State:
    """See `Grammar`. After an end of text there is nothing more but another one.

    Args:
        matcher: xgrammar's.
        stops: a mask of the tokens that end a text.
    """

    def __init__(self, matcher: Any, stops: npt.NDArray[np.int32]) -> None:
        self._matcher, self._stops = matcher, stops

    def mask(self, bits: npt.NDArray[np.int32]) -> bool:
        if self._matcher.is_terminated():
            bits[:] = self._stops
            return True
        return bool(self._matcher.fill_next_token_bitmask(bits.reshape(1, -1)))

    def accept(self, token: int) -> None:
        """Raises ValueError for a token that may not come."""
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} may not come here in the grammar")

    def rollback(self, tokens: int) -> None:
        self._matcher.rollback(tokens)

    @property
    def finished(self) -> bool:
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        bits = np.empty_like(self._stops)
        return self.mask(bits) and not np.any(bits & ~self._stops)  # nothing may come but the end


def _tokenizer_info(tokenizer: Any, vocab_size: int, stops: Sequence[int]) -> Any:
    """xgrammar's view of the tokens: special ones have no text, since none of theirs comes into an answer."""
    try:
        import xgrammar
    except ImportError as error:
        raise RequestError(
            "response_format", "grammars need xgrammar, which this server lacks: pip install 'deepseek-optimizer[serve]'"
        ) from error
    found = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(stops))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [b"" if i in special else text for i, text in enumerate(found.decoded_vocab)]
    return xgrammar.TokenizerInfo(
        texts,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(stops),
        add_prefix_space=found.add_prefix_space,
    )


def _parameters(function: Mapping[str, Any]) -> Enforced:
    """The schema of a tool's arguments, which are an object."""
    name, schema = excerpt(function["name"]), function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise RequestError("tools", f"parameters of {name}: must be an object")
    try:
        return normalise({"type": "object", **schema})
    except RequestError as error:
        raise RequestError("tools", f"parameters of {name}: {str(error).partition(': ')[2]}") from None


def _size(source: str, found: _Compiled | RequestError) -> int:
    """Bytes that a cached grammar takes."""
    return len(source) + (found.compiled.memory_size_bytes if isinstance(found, _Compiled) else 0)
