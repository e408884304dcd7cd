"""Which blocks to drop when a conversation outgrows its window in the cache. No torch, no bytes.

A window keeps attention sinks (the first tokens: Xiao et al. 2023, StreamingLLM), pinned spans, and the most recent tokens.
Whole blocks are dropped from the middle, oldest first, and a large share of the window at once: the keys of all later tokens
are rotated to new positions, which costs time and a little precision and should be rare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError, RequestError, shown
from .block_manager import BLOCK_TOKENS

Spans = tuple[tuple[int, int], ...]
SMALLEST = 4 * BLOCK_TOKENS


@dataclass(frozen=True)
class Drop:
    """A run of full blocks to drop: `count` of them, starting at `first_block`."""

    first_block: int
    count: int

    @property
    def begin(self) -> int:
        """The first token to be dropped."""
        return self.first_block * BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        return self.count * BLOCK_TOKENS

    def renumbered(self, spans: Iterable[tuple[int, int]]) -> Spans:
        """(begin, end) spans of tokens outside the run, as they are numbered after the drop."""
        return tuple((b - self.tokens, e - self.tokens) if b >= self.begin + self.tokens else (b, e) for b, e in spans)


@dataclass(frozen=True)
class CacheWindow:
    """When to drop blocks, and which.

    Attributes:
        tokens: tokens that a sequence may hold in the cache, SMALLEST or more.
        sinks: tokens at the beginning that are never dropped; rounded up to blocks.
        share: fraction of the window that is dropped at once where possible, above 0 and at most 0.5.
        recent: fraction of the window, of the newest tokens, that is never dropped, 0 to 0.5.
    """

    tokens: int
    sinks: int = 4
    share: float = 0.25
    recent: float = 0.25

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.tokens < SMALLEST:
            raise ConfigError(f"cache_window must be at least {SMALLEST} tokens, got {self.tokens}")
        if self.sinks < 0 or not 0 < self.share <= 0.5 or not 0 <= self.recent <= 0.5:
            raise ConfigError(
                f"cache_window: sinks must not be negative, share must be above 0 and at most 0.5, recent from 0 to 0.5; got "
                f"sinks {self.sinks}, share {self.share:g}, recent {self.recent:g}"
            )
        if self.room() < 1:
            raise ConfigError(
                f"cache_window: {self.sinks} sinks and the recent tokens fill all {self.tokens} tokens; use fewer sinks"
            )

    @property
    def recent_tokens(self) -> int:
        return int(self.tokens * self.recent)

    def room(self, pinned: Iterable[tuple[int, int]] = ()) -> int:
        """Tokens that can always be added in one step beside these pinned spans, whatever the window holds. Drops do not change
        it."""
        kept = -(-self.sinks // BLOCK_TOKENS) + len(self._pinned_blocks(pinned))
        return self.tokens - self.recent_tokens - kept * BLOCK_TOKENS - 2 * (BLOCK_TOKENS - 1)  # two blocks may be cut

    def check(self, pinned: Iterable[tuple[int, int]], coming: int = 1) -> None:
        """Validates pinned spans before a request starts.

        Raises:
            RequestError: they leave no room for steps of `coming` tokens.
        """
        pinned = tuple(pinned)
        if any(not 0 <= begin < end for begin, end in pinned):
            raise RequestError("pinned", f"each span must be (begin, end) with 0 <= begin < end, got {shown(pinned)}")
        if self.room(pinned) < coming:
            raise RequestError(
                "pinned",
                f"{len(self._pinned_blocks(pinned)) * BLOCK_TOKENS} of the window's {self.tokens} tokens, in blocks of "
                f"{BLOCK_TOKENS}, are pinned, which leaves no room for {coming} more besides the recent ones; pin fewer "
                "tokens, or use a larger window",
            )

    def drops(self, tokens: int, pinned: Iterable[tuple[int, int]] = (), coming: int = 1) -> list[Drop]:
        """Blocks to drop before `coming` more tokens are added; none while they fit.

        Args:
            tokens: tokens of the sequence in the cache.
            pinned: (begin, end) spans of tokens, in the sequence's present numbering; they may reach beyond the cached ones.

        Returns: runs of blocks, to be dropped in this order: the last run first, so that no drop renumbers another run.

        Raises:
            RequestError: sinks and pinned spans leave no room; `check` reports that in advance.
        """
        over = tokens + coming - self.tokens
        if over <= 0:
            return []
        pinned, needed = tuple(pinned), -(-over // BLOCK_TOKENS)
        wanted = max(needed, int(self.share * self.tokens) // BLOCK_TOKENS)
        kept, last = self._pinned_blocks(pinned), max(0, tokens - self.recent_tokens) // BLOCK_TOKENS
        going = [b for b in range(-(-self.sinks // BLOCK_TOKENS), last) if b not in kept][:wanted]
        if len(going) < needed:
            if pinned:
                self.check(pinned, coming)
            raise ValueError(f"cannot add {coming} tokens at once: a window of {self.tokens} has room for {self.room(pinned)}")
        runs: list[Drop] = []
        for block in going:
            if runs and block == runs[-1].first_block + runs[-1].count:
                runs[-1] = Drop(runs[-1].first_block, runs[-1].count + 1)
            else:
                runs.append(Drop(block, 1))
        return runs[::-1]

    def _pinned_blocks(self, pinned: Iterable[tuple[int, int]]) -> set[int]:
        """Blocks that hold a pinned token, sinks excluded. Drops shift spans by whole blocks, so the number stays."""
        sinks = -(-self.sinks // BLOCK_TOKENS)
        blocks = {block for begin, end in pinned for block in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS))}
        return {block for block in blocks if block >= sinks}
