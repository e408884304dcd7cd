"""kv_b in the form that absorbed attention reads: one stack of heads for the queries, and one for the values.

Head h of kv_b has `nope` key rows, then `v_dim` value rows, each of `rank` columns. Queries are multiplied along the key rows,
so those are transposed: [rank, nope], in fp32 if kv_b is fp32, else in bf16, since a format's groups would run along the other
axis. Value rows are unchanged: kv_b's own tiles if a head's rows fill whole tiles, else repacked as bf16 (or fp32).

Backends make the stacks themselves; here are the names by which their plans know them.
"""

from __future__ import annotations


def key_stack(kv_b: str) -> str:
    """A plan's name for the stack of keys of this weight."""
    return f"{kv_b}:keys"


def value_stack(kv_b: str) -> str:
    """A plan's name for the stack of values of this weight."""
    return f"{kv_b}:values"
