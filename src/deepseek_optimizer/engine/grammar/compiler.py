"""Compiles grammars with xgrammar: JSON, JSON schemas, regular expressions, EBNF, tool calls.

Grammars come from clients, so they are compiled in worker processes with limits (see `system.sandbox.worker`) and cached. A
grammar that cannot be compiled, takes too long or would slow down each step is refused with the reason.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import RequestError
from ...system.sandbox.pool import WorkerPool
from ...system.sandbox.worker import JobError, WorkerError
from ..request import CompiledGrammar, Grammar
from .calls import CallShape, tools_source
from .source import GrammarSource, ebnf_source, object_source, regex_source, schema_source
from .special_tokens import SpecialTokens
from .thoughts import AfterThoughts

_JOB = Path(__file__).with_name("job.py")
_MAX_BYTES = 1 << 25  # maximum size of a compiled grammar
_NO_TEXT = b"\xff"  # never part of a text in UTF-8: precedes special tokens, which only a grammar that names them allows
_NICE = 5  # niceness of the worker processes, so that running requests have precedence
_CACHED, _CACHED_BYTES = 256, 1 << 27  # maximum number and total size of cached grammars


class GrammarCompiler:
    """Compiles grammars for one model. Thread-safe; methods block until the grammar is compiled or a limit is reached.

    Args:
        tokenizer: the model's Transformers tokenizer.
        vocab_size: number of the model's logits; those beyond the tokenizer's tokens are never allowed.
        stop_token_ids: tokens that end a text, in addition to the tokenizer's end-of-text token.
        seconds: maximum CPU time to compile a grammar. A string with a maximum length of 128 or more takes one or two seconds,
            other parts of a schema take milliseconds.
        memory: maximum memory to compile a grammar, in bytes.
        workers: maximum number of worker processes.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        stop_token_ids: Iterable[int] = (),
        seconds: float = 10.0,
        memory: int = 1 << 30,
        workers: int = 1,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        own = tokenizer.eos_token_id
        self._stops = sorted({*stop_token_ids, *([] if own is None else [own])})
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = SpecialTokens(special, self._stops)
        self._seconds, self._memory, self._count = seconds, memory, workers
        self._lock = threading.Lock()
        self._info: Any = None
        self._workers: WorkerPool | None = None
        self._closed = False
        self._cache: OrderedDict[tuple[str, str], _Compiled | RequestError] = OrderedDict()

    def json_object(self) -> CompiledGrammar:
        """Compiles a grammar for any JSON object."""
        return self.compile(object_source())

    def json_schema(self, schema: Mapping[str, Any] | str) -> CompiledGrammar:
        """Compiles a grammar for JSON that is valid under a schema; errors as of `schema_source` and `compile`."""
        return self.compile(schema_source(schema))

    def regex(self, pattern: str) -> CompiledGrammar:
        """Compiles a grammar for text that a regular expression matches; errors as of `regex_source` and `compile`."""
        return self.compile(regex_source(pattern))

    def ebnf(self, text: str) -> CompiledGrammar:
        """Compiles a grammar in GBNF; errors as of `ebnf_source` and `compile`."""
        return self.compile(ebnf_source(text))

    def tools(
        self, tools: Sequence[Mapping[str, Any]], choice: str, shape: CallShape, parallel: bool = True
    ) -> CompiledGrammar | None:
        """Compiles a grammar for tool calls; arguments and errors as of `tools_source` and `compile`.

        Returns: None if the text is not constrained.
        """
        source = tools_source(tools, choice, shape, parallel)
        return None if source is None else self.compile(source)

    def known(self, source: GrammarSource) -> CompiledGrammar | None:
        """Returns the cached grammar of a source; None: it is not cached, so `compile` would have to compile it.

        Raises:
            RequestError: the grammar was refused before.
        """
        with self._lock:
            cached = self._cache.get((source.kind, source.text))
            if cached is not None:
                self._cache.move_to_end((source.kind, source.text))
        if isinstance(cached, RequestError):
            raise RequestError(source.field, str(cached).partition(": ")[2])
        return cached

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Compiles a grammar, or returns it from the cache.

        Raises:
            RequestError: the grammar is invalid, or cannot be compiled within the limits.
            WorkerLostError: the worker process was killed from outside twice.
            EngineBusyError: no worker became free in time.
        """
        cached = self.known(source)
        if cached is not None:
            return cached
        compiled = self._compile(source)
        self._add_to_cache((source.kind, source.text), compiled)
        if isinstance(compiled, RequestError):
            raise compiled
        return compiled

    def after_thoughts(self, grammar: CompiledGrammar, open_tag: str, close_tag: str, opened: bool) -> CompiledGrammar:
        """Returns a grammar for a model that thinks first: thoughts are unconstrained, then `grammar` applies.

        Args:
            grammar: grammar of the answer.
            open_tag, close_tag: tags around thoughts, each a single token.
            opened: the prompt ends with `open_tag`; otherwise the model may begin with it, or answer without thoughts.

        Raises:
            RequestError: the tokenizer has no such token.
        """
        ids = [self._tokenizer.convert_tokens_to_ids(tag) for tag in (open_tag, close_tag)]
        if any(i is None or i == self._tokenizer.unk_token_id for i in ids):
            raise RequestError(
                "response_format", f"this model's tokenizer has no token {close_tag}, which must end the thoughts"
            )
        return AfterThoughts(grammar, None if opened else ids[0], ids[1], self._stops)

    def close(self) -> None:
        """Ends the worker processes; compiled grammars stay usable."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def start(self) -> None:
        """Starts the worker processes, which takes seconds, so that the first grammars need not wait for them."""
        self._started().start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        with self._lock:
            return self._workers.pids if self._workers is not None else []

    def _compile(self, source: GrammarSource) -> _Compiled | RequestError:
        workers = self._started()
        wanted = self._special.replaced(source.text) if source.kind == "calls" else source.text
        try:
            text = workers.call({"kind": source.kind, "source": wanted})
        except JobError as error:
            return RequestError(source.field, str(error))
        except WorkerError as error:  # not cached: the machine may have been busy
            raise RequestError(source.field, str(error)) from None
        import xgrammar

        return _Compiled(xgrammar.CompiledGrammar.deserialize_json(text, self._info), self._vocab_size, self._stops)

    def _add_to_cache(self, key: tuple[str, str], compiled: _Compiled | RequestError) -> None:
        with self._lock:
            self._cache[key] = compiled
            size = sum(_size(source, value) for (_, source), value in self._cache.items())
            while len(self._cache) > _CACHED or (size > _CACHED_BYTES and len(self._cache) > 1):
                (_, source), oldest = self._cache.popitem(last=False)
                size -= _size(source, oldest)

    def _started(self) -> WorkerPool:
        with self._lock:
            if self._closed:
                raise RequestError("grammar", "the server is shutting down")
            if self._workers is None:
                self._info = _tokenizer_info(self._tokenizer, self._vocab_size, self._stops)
                setup = {"tokenizer": self._info.serialize_json(), "max_bytes": _MAX_BYTES}
                self._workers = WorkerPool(
                    _JOB, setup, self._count, patience=2 * self._seconds, seconds=self._seconds, memory=self._memory, nice=_NICE
                )
            return self._workers


class _Compiled:
    """A `CompiledGrammar`.

    Args:
        compiled: xgrammar's compiled grammar.
        vocab_size: number of the model's logits.
        stops: end-of-text tokens.
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
    """A `Grammar`. After an end-of-text token, only end-of-text tokens are allowed.

    Args:
        matcher: xgrammar's matcher.
        stops: bitmask of the end-of-text tokens.
    """

    def __init__(self, matcher: Any, stops: npt.NDArray[np.int32]) -> None:
        self._matcher, self._stops = matcher, stops

    def mask(self, bits: npt.NDArray[np.int32]) -> bool:
        if self._matcher.is_terminated():
            bits[:] = self._stops
            return True
        return bool(self._matcher.fill_next_token_bitmask(bits.reshape(1, -1)))

    def accept(self, token: int) -> None:
        """Advances by a token; raises ValueError if it is not allowed."""
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} is not allowed by the grammar at this position")

    def rollback(self, tokens: int) -> None:
        self._matcher.rollback(tokens)

    @property
    def finished(self) -> bool:
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        bits = np.empty_like(self._stops)
        return self.mask(bits) and not np.any(bits & ~self._stops)  # only the end is allowed


def _tokenizer_info(tokenizer: Any, vocab_size: int, stops: Sequence[int]) -> Any:
    """Returns xgrammar's description of the vocabulary. Special tokens get no text, since their text is not part of answers."""
    try:
        import xgrammar
    except ImportError as error:
        raise RequestError(
            "response_format", "grammars need xgrammar, which is not installed: pip install 'deepseek-optimizer[serve]'"
        ) from error
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(stops))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = [_NO_TEXT + text if i in special else text for i, text in enumerate(info.decoded_vocab)]
    return xgrammar.TokenizerInfo(
        texts,
        xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(stops),
        add_prefix_space=info.add_prefix_space,
    )


def _size(source: str, compiled: _Compiled | RequestError) -> int:
    """Returns the size of a cached grammar in bytes."""
    return len(source) + (compiled.compiled.memory_size_bytes if isinstance(compiled, _Compiled) else 0)
