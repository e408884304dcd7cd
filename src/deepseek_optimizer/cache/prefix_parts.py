"""What a cached prefix consists of: its blocks in each group of layers, and the recurrent states after it.

With a window, only the blocks are needed that the next token attends to; with recurrent states, a prefix can be continued only
where they are stored. `longest` and `required` say so for any storage: the prefix cache in memory, and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .block_manager import BLOCK_TOKENS
from .forgetting import Forgetting, Groups

Key = bytes
Part = tuple[Key, int]  # the key of a prefix that ends with a block; and the block's group of layers, or STATES
STATES = -1  # in place of a group: the recurrent states after the block


def seen(forgetting: Forgetting | None, blocks: int) -> Iterable[int]:
    """Indices, ascending, of the first `blocks` blocks that the token after them attends to."""
    if forgetting is None:
        return range(blocks)
    return _with_sinks(forgetting, forgetting.first_seen(blocks * BLOCK_TOKENS), blocks)


def kept(forgetting: Forgetting | None, blocks: int) -> Iterable[int]:
    """Indices, ascending, of the first `blocks` blocks that a sequence keeps that ends after them."""
    if forgetting is None:
        return range(blocks)
    return _with_sinks(forgetting, forgetting.first_kept(blocks * BLOCK_TOKENS), blocks)


def _with_sinks(forgetting: Forgetting, first: int, blocks: int) -> Iterable[int]:
    sinks = forgetting.sink_blocks
    return (*range(min(sinks, blocks)), *range(max(sinks, first), blocks))


def required(prefix: list[Key], groups: Groups, states: bool) -> Iterator[Part]:
    """The parts that are needed to continue a prefix.

    Args:
        prefix: keys of its blocks.
        groups: for each group of layers, which blocks a sequence does not attend to any more.
        states: whether the model has recurrent states.
    """
    for group, forgetting in enumerate(groups):
        for n in seen(forgetting, len(prefix)):
            yield prefix[n], group
    if states and prefix:
        yield prefix[-1], STATES


def longest(wanted: list[Key], groups: Groups, states: bool, has: Callable[[Key, int], bool]) -> int:
    """Number of blocks of the longest prefix that can be continued.

    Args:
        wanted: keys of a text's blocks.
        groups, states: as for `required`.
        has: whether a part is stored.
    """

    def has_state(blocks: int) -> bool:
        return not states or has(wanted[blocks - 1], STATES)

    most = len(wanted)
    for group, forgetting in enumerate(groups):
        if forgetting is None:
            most = _unbroken(wanted[:most], group, has)
    if not any(groups):
        return next((n for n in range(most, 0, -1) if has_state(n)), 0)
    possible = [n for n in range(1, most + 1) if has_state(n)]
    for group, forgetting in enumerate(groups):
        if forgetting is not None and possible:
            possible = _continuable(wanted, group, forgetting, possible, has)
    return max(possible, default=0)


def _unbroken(wanted: list[Key], group: int, has: Callable[[Key, int], bool]) -> int:
    """Number of blocks before the first one that the group lacks."""
    return next((n for n, key in enumerate(wanted) if not has(key, group)), len(wanted))


def _continuable(
    wanted: list[Key], group: int, forgetting: Forgetting, possible: list[int], has: Callable[[Key, int], bool]
) -> list[int]:
    """Those numbers of blocks, in ascending order, after which a group with a window has what the next token attends to."""
    unbroken = _unbroken(wanted[: possible[-1]], group, has)
    if unbroken < forgetting.sink_blocks:
        return [n for n in possible if n <= unbroken]
    runs, run = {}, 0  # number of blocks without a gap that end at block n
    for n in range(1, possible[-1] + 1):
        run = run + 1 if has(wanted[n - 1], group) else 0
        runs[n] = run
    first_seen = {n: max(forgetting.sink_blocks, forgetting.first_seen(n * BLOCK_TOKENS)) for n in possible}
    return [n for n in possible if runs[n] >= n - first_seen[n]]
