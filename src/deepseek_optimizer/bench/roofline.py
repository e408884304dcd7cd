"""Compares a measured speed with the machine's limits: the share of memory bandwidth and of arithmetic peak reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .machine_limits import matrix_tera, read_gb_s, read_regions_gb_s
from .memory_traffic import Traffic
from .work import Work


class Roofline:
    """Measures the limits of the machine, each once, and compares speeds with them.

    Args:
        threads: number of threads that the model uses.
        matrices: (address, bytes) of the memory of the model's matrices, if bandwidth is to be measured on it.
    """

    def __init__(self, threads: int, matrices: Sequence[tuple[int, int]] = ()) -> None:
        self.threads = threads
        self._matrices = matrices
        self._read: dict[int, float] = {}
        self._matrix: dict[str, float] | None = None

    def share(self, traffic: Traffic, work: Work, ttft_ms: float, decode_tok_s: float | None) -> dict[str, Any]:
        """Bytes and operations of this work, the speed reached, and its percentage of the machine's limits.

        Bandwidth is measured on the model's own matrices, or without them on as many bytes as a decode step reads, since small
        sizes are read from a cache. The arithmetic peak is that of the fastest kind of matrix product on this machine, which is
        named.
        """
        if self._matrix is None:
            self._matrix = matrix_tera(self.threads)
        kind = max(self._matrix, key=self._matrix.__getitem__)
        tera = traffic.prefill_operations(work) / (ttft_ms / 1e3) / 1e12
        result: dict[str, Any] = {
            "prefill_operations": traffic.prefill_operations(work),
            "prefill_tera": tera,
            "matrix_tera": self._matrix,
            "matrix_percent": 100 * tera / self._matrix[kind],
            "matrix_percent_of": f"torch's {kind} product",
            "token_bytes": traffic.token_bytes(work),
        }
        if decode_tok_s:
            size = int(traffic.step_bytes(work))
            if size not in self._read:
                own = read_regions_gb_s(self._matrices, self.threads) if self._matrices else None
                self._read[size] = own or read_gb_s(size, self.threads)
            reached = traffic.token_bytes(work) * decode_tok_s / 1e9
            result |= {
                "read_gb_s": reached,
                "machine_read_gb_s": self._read[size],
                "bandwidth_percent": 100 * reached / self._read[size],
            }
        return result
