"""The cache window of a dialogue that outgrows its cache: which blocks go. No torch, no bytes.

A window keeps its sinks (the first tokens, which every model leans on: Xiao et al. 2023, StreamingLLM), pinned spans, and the
most recent tokens. What is dropped are whole blocks from the midst, the oldest first, a good share of the window at once: the
keys of all tokens behind the gap turn to new positions, which costs time and a little precision, so that it should be rare.
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
    """A run of full blocks that goes: `count` of them from `first_block` on."""

    first_block: int
    count: int

    @property
    def begin(self) -> int:
        """The first token that goes."""
        return self.first_block * BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        return self.count * BLOCK_TOKENS

    def renumbered(self, spans: Iterable[tuple[int, int]]) -> Spans:
        """(begin, end) spans of tokens, none of which went, as they are numbered afterwards."""
        return tuple((b - self.tokens, e - self.tokens) if b >= self.begin + self.tokens else (b, e) for b, e in spans)


@dataclass(frozen=True)
class CacheWindow:
    """
    Attributes:
        tokens: that the cache of a sequence may hold, SMALLEST or more.
        sinks: tokens at the beginning that always stay; rounded up to blocks.
        share: of the window that goes at once, so far as there is so much, above 0 and at most 0.5.
        recent: share of the window, of the newest tokens, that never goes, 0 to 0.5.
    """

    tokens: int
    sinks: int = 4
    share: float = 0.25
    recent: float = 0.25

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.tokens < SMALLEST:
            raise ConfigError(f"cache_window: {self.tokens} tokens, and {SMALLEST} is the smallest that there is")
        if self.sinks < 0 or not 0 < self.share <= 0.5 or not 0 <= self.recent <= 0.5:
            raise ConfigError(
                f"cache_window: sinks must not be negative, share above 0 and at most 0.5, recent from 0 to 0.5; they are "
                f"{self.sinks}, {self.share:g} and {self.recent:g}"
            )
        if self.room() < 1:
            raise ConfigError(
                f"cache_window: {self.sinks} sinks and the recent tokens fill all {self.tokens}; take fewer sinks"
            )

    @property
    def recent_tokens(self) -> int:
        return int(self.tokens * self.recent)

    def room(self, pinned: Iterable[tuple[int, int]] = ()) -> int:
        """Tokens that may always come at once beside these pinned spans, whatever the window holds. Drops don't change it."""
        kept = -(-self.sinks // BLOCK_TOKENS) + len(self._pinned_blocks(pinned))
        return self.tokens - self.recent_tokens - kept * BLOCK_TOKENS - 2 * (BLOCK_TOKENS - 1)  # two blocks may be cut

    def check(self, pinned: Iterable[tuple[int, int]], coming: int = 1) -> None:
        """To be asked before a request begins. Raises RequestError where pinned spans leave no room for steps of `coming`
        tokens."""
        pinned = tuple(pinned)
        if any(not 0 <= begin < end for begin, end in pinned):
            raise RequestError("pinned", f"a span is (begin, end) with 0 <= begin < end, got {shown(pinned)}")
        if self.room(pinned) < coming:
            raise RequestError(
                "pinned",
                f"{len(self._pinned_blocks(pinned)) * BLOCK_TOKENS} of the window's {self.tokens} tokens, in blocks of "
                f"{BLOCK_TOKENS}, leave no room for {coming} more beside the recent ones. Pin less, or take a larger window",
            )

    def drops(self, tokens: int, pinned: Iterable[tuple[int, int]] = (), coming: int = 1) -> list[Drop]:
        """What must go before `coming` more tokens are read: nothing while they fit.

        Args:
            tokens: of the sequence that are in the cache.
            pinned: (begin, end) spans of tokens, in the sequence's present numbering; they may reach behind the cached ones.

        Returns: runs of blocks in the order in which they go, the last one first: so no run changes another's numbers.

        Raises: RequestError where sinks and pinned spans leave no room; `check` says so in advance.
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
            raise ValueError(f"{coming} tokens at once, and a window of {self.tokens} has room for {self.room(pinned)}")
        runs: list[Drop] = []
        for block in going:
            if runs and block == runs[-1].first_block + runs[-1].count:
                runs[-1] = Drop(runs[-1].first_block, runs[-1].count + 1)
            else:
                runs.append(Drop(block, 1))
        return runs[::-1]

    def _pinned_blocks(self, pinned: Iterable[tuple[int, int]]) -> set[int]:
        """Blocks that hold a pinned token; sinks are not counted again. Drops move spans by whole blocks: as many as before."""
        sinks = -(-self.sinks // BLOCK_TOKENS)
        blocks = {block for begin, end in pinned for block in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS))}
        return {block for block in blocks if block >= sinks}
