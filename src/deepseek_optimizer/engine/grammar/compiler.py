"""Grammars that an answer must keep to, by xgrammar: JSON, JSON schemas, regular expressions, EBNF, calls of tools.

They come from clients, so they are compiled in a process of its own, with limits (see `worker`), and cached. A grammar that
can't be compiled, takes too long or would slow down each step is refused with the reason.
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
from .source import CallShape, GrammarSource, ebnf_source, object_source, regex_source, schema_source, tools_source
from .thoughts import AfterThoughts

_JOB = Path(__file__).with_name("job.py")
_MAX_BYTES = 1 << 25  # of a compiled grammar
_NICE = 5  # of the processes: answers that are being written go first
_CACHED, _CACHED_BYTES = 256, 1 << 27  # compiled grammars kept at most


class GrammarCompiler:
    """Makes grammars for one model. Methods block, at most for as long as a job may take, and may be called by many threads.

    Args:
        tokenizer: of Transformers.
        vocab_size: of the model's logits: it may have more than the tokenizer has tokens, and those are never allowed.
        stop_token_ids: that end a text, beside the tokenizer's end of text.
        seconds: of CPU time that compiling one may take. A string of a bounded length of 128 or more takes one or two of them,
            the others of a schema milliseconds.
        memory: bytes that it may take.
        workers: processes that compile, at most.
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
        self._seconds, self._memory, self._count = seconds, memory, workers
        self._lock = threading.Lock()
        self._info: Any = None
        self._workers: WorkerPool | None = None
        self._closed = False
        self._cache: OrderedDict[tuple[str, str], _Compiled | RequestError] = OrderedDict()

    def json_object(self) -> CompiledGrammar:
        """Any JSON object."""
        return self.compile(object_source())

    def json_schema(self, schema: Mapping[str, Any] | str) -> CompiledGrammar:
        """JSON that is valid under a schema; errors as of `schema_source` and `compile`."""
        return self.compile(schema_source(schema))

    def regex(self, pattern: str) -> CompiledGrammar:
        """Text that a regular expression matches; errors as of `regex_source` and `compile`."""
        return self.compile(regex_source(pattern))

    def ebnf(self, text: str) -> CompiledGrammar:
        """Text of a grammar in GBNF; errors as of `ebnf_source` and `compile`."""
        return self.compile(ebnf_source(text))

    def tools(
        self, tools: Sequence[Mapping[str, Any]], choice: str, shape: CallShape, parallel: bool = True
    ) -> CompiledGrammar | None:
        """Calls of tools; arguments and errors as of `tools_source` and `compile`. None: nothing is asked of the text."""
        source = tools_source(tools, choice, shape, parallel)
        return None if source is None else self.compile(source)

    def known(self, source: GrammarSource) -> CompiledGrammar | None:
        """What was compiled of this source before; None: nothing, so that `compile` would have work to do.

        Raises:
            RequestError: it was refused before.
        """
        with self._lock:
            found = self._cache.get((source.kind, source.text))
            if found is not None:
                self._cache.move_to_end((source.kind, source.text))
        if isinstance(found, RequestError):
            raise RequestError(source.field, str(found).partition(": ")[2])
        return found

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """
        Raises:
            RequestError: it is wrong, or can't be compiled within the limits.
            WorkerLostError: something else ended the process that compiled it, twice.
            EngineBusyError: others' grammars took all the time that one waits for them.
        """
        found = self.known(source)
        if found is not None:
            return found
        made = self._make(source)
        self._keep((source.kind, source.text), made)
        if isinstance(made, RequestError):
            raise made
        return made

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
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def start(self) -> None:
        """Starts the processes, which takes seconds: the first grammars need not wait for them."""
        self._started().start()

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        with self._lock:
            return self._workers.pids if self._workers is not None else []

    def _make(self, source: GrammarSource) -> _Compiled | RequestError:
        workers = self._started()
        try:
            text = workers.call({"kind": source.kind, "source": source.text})
        except JobError as error:
            return RequestError(source.field, str(error))
        except WorkerError as error:  # not kept: it may have been the machine
            raise RequestError(source.field, str(error)) from None
        import xgrammar

        return _Compiled(xgrammar.CompiledGrammar.deserialize_json(text, self._info), self._vocab_size, self._stops)

    def _keep(self, key: tuple[str, str], found: _Compiled | RequestError) -> None:
        with self._lock:
            self._cache[key] = found
            size = sum(_size(source, value) for (_, source), value in self._cache.items())
            while len(self._cache) > _CACHED or (size > _CACHED_BYTES and len(self._cache) > 1):
                (_, source), oldest = self._cache.popitem(last=False)
                size -= _size(source, oldest)

    def _started(self) -> WorkerPool:
        with self._lock:
            if self._closed:
                raise RequestError("grammar", "the server is ending")
            if self._workers is None:
                self._info = _tokenizer_info(self._tokenizer, self._vocab_size, self._stops)
                setup = {"tokenizer": self._info.serialize_json(), "most": _MAX_BYTES}
                self._workers = WorkerPool(
                    _JOB, setup, self._count, patience=2 * self._seconds, seconds=self._seconds, memory=self._memory, nice=_NICE
                )
            return self._workers


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


def _size(source: str, found: _Compiled | RequestError) -> int:
    """Bytes that a cached grammar takes."""
    return len(source) + (found.compiled.memory_size_bytes if isinstance(found, _Compiled) else 0)
