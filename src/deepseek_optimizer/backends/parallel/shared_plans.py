"""The plans of a process, by the numbers that all processes of a model know them by."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import UnsupportedRequestError
from ...graph.ir import Graph
from ..base import Plan
from ..cpu import CpuPlan
from .leader import Leader
from .links import Links


class SharedPlans:
    """Plans of graphs of whole models, in the order in which all processes have compiled them.

    Args:
        processes: number of the processes.
        leader: of rank 0 the other processes; None in these.
    """

    def __init__(self, processes: int, leader: Leader | Links | None) -> None:
        self._processes, self._leader = processes, leader
        self._graphs: list[Graph] = []
        self._plans: list[CpuPlan] = []
        self._all_compile = False  # whether the others compile what this one does

    def __getitem__(self, number: int) -> CpuPlan:
        return self._plans[number]

    def check(self, graph: Graph) -> None:
        """Raises UnsupportedRequestError in the leader for a graph that the other processes do not compile."""
        if graph in self._graphs or self._leader is None or not self._leader.ready or self._all_compile:
            return
        raise UnsupportedRequestError(
            f"the model runs in {self._processes} processes, which have its own plan only; load it without parallel"
        )

    def add(self, graph: Graph, plan: CpuPlan) -> int:
        """Adds this process's plan of a graph, or replaces it; returns its number."""
        if graph not in self._graphs:
            self._graphs.append(graph)
            self._plans.append(plan)
        number = self._graphs.index(graph)
        self._plans[number] = plan
        return number

    def in_all(self, compile_own: Callable[[], Plan]) -> Plan:
        """Calls a function that compiles what the other processes compile, too."""
        self._all_compile = True
        try:
            return compile_own()
        finally:
            self._all_compile = False
