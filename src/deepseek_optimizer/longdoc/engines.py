"""The engines that process a document, with a KV cache of their own, within a memory limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends.base import BLOCK_TOKENS
from ..cache.cache_window import SMALLEST
from ..cache.forgetting import kept_whole, max_tokens
from ..cache.prefix_cache import PrefixCache
from ..engine.engine import Engine
from ..engine.grammar.compiler import GrammarCompiler
from ..errors import ConfigError, UnsupportedModelError
from ..graph.rope_rotation import key_rotation
from ..integration.bind.runtime import runtime_of
from ..serving import make_engine
from .own_memory import own_bytes

WINDOW = 16_384  # maximum tokens of the sliding window
MIN_CACHE = 512  # minimum tokens of the cache
_OTHERS = 64 << 20  # bytes for everything besides cache and buffers: the interpreter, prompts, sampling
_CHARACTER = 24  # bytes of index, prompts and citations per character of the document


class Engines:
    """
    Args:
        model, tokenizer: see `make_engine`.
        memory: bytes above `base` that this process may use; None: the cache may be as large as the model's own.
        base: bytes used before the document was read; None: unknown.
        characters: length of the document.

    Raises:
        ConfigError: the memory is too small for a cache of MIN_CACHE tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, memory: int | None, base: int | None, characters: int) -> None:
        self.runtime = runtime_of(model)
        self._model, self._tokenizer = model, tokenizer
        plan = self.runtime.plan  # allocates its buffers and compiles before the rest is divided
        granted = self.runtime.config.kv_cache_memory
        if memory is not None:
            granted = self._cache_bytes(plan, memory, base, characters)
        self.arena = self.runtime.new_arena(granted)
        self._engines: dict[bool, Engine] = {}
        self._compiler: GrammarCompiler | None = None

    @property
    def room(self) -> int:
        """Maximum tokens of prompt and reply together."""
        return self.engine(False).core.room

    @property
    def window(self) -> int | None:
        """Tokens of the sliding window; None if there can be none: the model's keys cannot be rotated, or the cache is too
        small."""
        arena, step = self.arena, self.runtime.config.prefill_chunk
        tokens = max_tokens(kept_whole(arena.manager.groups), arena.store.num_blocks, step, WINDOW)
        size = min(self.runtime.graph.max_positions, tokens)
        if self.runtime.config.batch_invariant or size < SMALLEST:
            return None
        try:
            key_rotation(self.runtime.graph)
        except UnsupportedModelError:
            return None
        return size

    def engine(self, window: bool) -> Engine:
        """The engine for prompts that fit, or the one with a sliding window. Clears the other engine's prefix cache."""
        if (other := self._engines.get(not window)) is not None:
            self._forget(other)
        if window not in self._engines:
            options = {"cache_window": self.window} if window else {}
            self._engines[window] = make_engine(self._model, self._tokenizer, arena=self.arena, **options)
        return self._engines[window]

    @property
    def prefix(self) -> PrefixCache:
        """The prefix cache of the engine for prompts that fit."""
        prefix = self.engine(False).core.prefix
        assert prefix is not None
        return prefix

    def grammar(self, schema: Mapping[str, Any]) -> Any:
        """Compiles a JSON schema to a grammar."""
        if self._compiler is None:
            facts = self.engine(False).core.facts
            self._compiler = GrammarCompiler(self._tokenizer, facts.vocab_size, stop_token_ids=facts.eos)
        return self._compiler.json_schema(schema)

    def close(self) -> None:
        """Releases the cache and ends the grammar processes."""
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
        graph = self.runtime.graph
        blocks = MIN_CACHE // BLOCK_TOKENS * graph.cache.groups
        minimum = blocks * self.runtime.backend.block_bytes(graph, self.runtime.kv_dtype)
        if memory - rest < minimum:
            raise ConfigError(
                f"memory: {memory / 1e9:.3g} GB is too little: this document needs at least {(rest + minimum) / 1e9:.3g} GB "
                "besides the weights; raise the limit, or use less text"
            )
        return memory - rest
