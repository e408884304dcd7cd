"""The engines that a document is read with, over cache memory of its own and within the bytes that all of it may take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends.base import BLOCK_TOKENS
from ..cache.cache_window import SMALLEST
from ..cache.prefix_cache import PrefixCache
from ..engine.engine import Engine
from ..engine.grammar.compiler import GrammarCompiler
from ..errors import ConfigError, UnsupportedModelError
from ..graph.rotation import key_rotation
from ..integration.bind.runtime import runtime_of
from ..serving import make_engine
from .own_memory import own_bytes

WINDOW = 16_384  # tokens of the window that a document is read through, at most
LEAST = 512  # tokens that the cache must hold
_OTHERS = 64 << 20  # bytes for what is neither cache nor buffers: the interpreter's own, prompts, sampling
_CHARACTER = 24  # bytes that the index, prompts and citations take of each character of the document


class Engines:
    """
    Args:
        model, tokenizer: as of `make_engine`.
        memory: bytes above `base` that this process may take; None: as much cache as the model's own may have.
        base: bytes that it had before the document was read; None: it cannot be told.
        characters: of the document.

    Raises:
        ConfigError: the memory does not hold a cache of LEAST tokens beside the rest.
    """

    def __init__(self, model: Any, tokenizer: Any, memory: int | None, base: int | None, characters: int) -> None:
        self.runtime = runtime_of(model)
        self._model, self._tokenizer = model, tokenizer
        plan = self.runtime.plan  # its buffers, and what compiling takes, are there before the rest is shared out
        granted = self.runtime.config.kv_cache_memory
        if memory is not None:
            granted = self._cache_bytes(plan, memory, base, characters)
        self.arena = self.runtime.new_arena(granted)
        self._engines: dict[bool, Engine] = {}
        self._compiler: GrammarCompiler | None = None

    @property
    def room(self) -> int:
        """Tokens that prompt and reply may take together."""
        return self.engine(False).core.room

    @property
    def window(self) -> int | None:
        """Tokens of the window; None where there can be none: keys of the model can't be moved, or the room is too small."""
        most = min(self.runtime.graph.max_positions, self.arena.store.num_blocks * BLOCK_TOKENS, WINDOW)
        if self.runtime.config.batch_invariant or most < SMALLEST:
            return None
        try:
            key_rotation(self.runtime.graph)
        except UnsupportedModelError:
            return None
        return most

    def engine(self, window: bool) -> Engine:
        """The engine for prompts that fit, or the one that reads through a window. The other's cached prefixes are given up."""
        if (other := self._engines.get(not window)) is not None:
            self._forget(other)
        if window not in self._engines:
            options = {"cache_window": self.window} if window else {}
            self._engines[window] = make_engine(self._model, self._tokenizer, arena=self.arena, **options)
        return self._engines[window]

    @property
    def prefix(self) -> PrefixCache:
        """What the engine for prompts that fit has read."""
        found = self.engine(False).core.prefix
        assert found is not None
        return found

    def grammar(self, schema: Mapping[str, Any]) -> Any:
        """A grammar of a JSON schema."""
        if self._compiler is None:
            facts = self.engine(False).core.facts
            self._compiler = GrammarCompiler(self._tokenizer, facts.vocab_size, stop_token_ids=facts.eos)
        return self._compiler.json_schema(schema)

    def close(self) -> None:
        """Gives the cache back, and ends the processes that were started."""
        for engine in self._engines.values():
            self._forget(engine)
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

    def _forget(self, engine: Engine) -> None:
        with self.arena.locked():
            if engine.core.prefix is not None:
                engine.core.prefix.clear()

    def _cache_bytes(self, plan: Any, memory: int, base: int | None, characters: int) -> int:
        config = self.runtime.config
        rows = config.batch_size_range[1]
        buffers = plan.buffer_bytes(config.prefill_chunk, rows) + 4 * rows * self.runtime.graph.vocab_size
        now = own_bytes()
        taken = 0 if base is None or now is None else max(0, now - base)
        rest = max(taken, buffers) + _CHARACTER * characters + _OTHERS
        least = LEAST // BLOCK_TOKENS * self.runtime.backend.block_bytes(self.runtime.graph, self.runtime.kv_dtype)
        if memory - rest < least:
            raise ConfigError(
                f"memory: {memory / 1e9:.3g} GB, and reading this document takes at least {(rest + least) / 1e9:.3g} GB above "
                "the weights; allow that much, or give less text"
            )
        return memory - rest
