"""`model.dso` of a multimodal model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..bind.runtime import Runtime
from ..general import GeneralRuntime
from ..general.report import GeneralReport, make_report
from ..model.report import FormatRow, Report
from .forward import OuterCall, Recorded, WholeForward
from .generate import WholeGenerate
from .language_model import LanguageModel
from .pictures import Call, with_layer_inputs
from .tower import Pace, TowerPlans


@dataclass(frozen=True)
class MultimodalReport:
    """What was optimized in a multimodal model.

    Attributes:
        path: "multimodal".
        language: the report about the language model, which has a plan.
        rest: that about everything else; its path is "general".
        towers: by the path of each vision tower of a known kind "plan", or why its layers have none. The modules around them
            are on the general path.
    """

    path: str
    language: Report
    rest: GeneralReport
    towers: Mapping[str, str]

    @property
    def family(self) -> str:
        """`model_type` of the whole model."""
        return self.rest.family

    @property
    def formats(self) -> tuple[FormatRow, ...]:
        """The weight formats of the language model."""
        return self.language.formats

    @property
    def backend(self) -> str:
        """The backend of both."""
        return self.language.backend

    @property
    def detail(self) -> str:
        """Its ISA and threads, or its device."""
        return self.language.detail

    @property
    def kv_cache(self) -> str:
        """Storage format of the language model's cache."""
        return self.language.kv_cache

    @property
    def bytes_after(self) -> int:
        """Size of all weights."""
        return self.rest.bytes_after

    def to_dict(self) -> dict[str, Any]:
        """The report as a dict of JSON types."""
        parts = {"language": self.language.to_dict(), "rest": self.rest.to_dict()}
        return {"path": self.path, **parts, "towers": dict(self.towers)}

    def __rich__(self) -> Any:
        """Both tables for rich's `print`."""
        from rich.console import Group

        return Group(self.language.__rich__(), self.rest.__rich__(), self._plans_of_towers())

    def __str__(self) -> str:
        return f"{self.language}\n{self.rest}\n{self._plans_of_towers()}"

    def _plans_of_towers(self) -> str:
        rows = [f"{path}: {what}" for path, what in self.towers.items()]
        return "vision towers: " + ("; ".join(rows) or "Transformers' forward")


class MultimodalRuntime(GeneralRuntime):
    """The runtime of the whole model: that of the general path, and the language model with its own.

    Args: as in `GeneralRuntime`.

    Attributes: those of `GeneralRuntime`, and
        language_model: the language model, which shares the modules; `bind` sets it.
        outer: the call of the whole model's forward in progress.
        pace: how the pictures of a thread are encoded.
        towers: the plans of the vision towers, by path; `bind` sets them.
        no_tower_plan: why others of a known kind have none, by path.
    """

    language_model: LanguageModel
    towers: dict[str, TowerPlans]
    no_tower_plan: dict[str, str]

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        self.outer = OuterCall()
        self.pace = Pace()
        self.towers, self.no_tower_plan = {}, {}
        super().__init__(model, *args, **options)

    def own_methods(self) -> dict[str, Any]:
        return {**super().own_methods(), "forward": WholeForward(self), "generate": WholeGenerate(self)}

    def own_report(self) -> Any:
        towers = {**dict.fromkeys(self.towers, "plan"), **self.no_tower_plan}
        return MultimodalReport("multimodal", self.language.report(), make_report(self), towers)

    @property
    def language(self) -> Runtime:
        """The runtime of the language model."""
        runtime: Any = self.language_model.dso
        return cast(Runtime, runtime)

    def language_call(self, arguments: dict[str, Any]) -> Call:
        """The call of the language model that a forward of the whole model would make; the language model is not run.

        Args:
            arguments: of the whole model's forward.
        """
        outer = self.outer
        with torch.no_grad():
            arguments, known = with_layer_inputs(self.model, arguments)
        before, outer.arguments, outer.records = outer.arguments, known, True
        try:
            with torch.no_grad(), self.running():
                type(self.model).forward(self.model, **arguments)
        except Recorded as recorded:
            return recorded.call
        finally:
            outer.arguments, outer.records = before, False
        raise AssertionError("the forward did not call the language model")

    # What `generate` needs of the language model's runtime.

    @property
    def graph(self) -> Any:
        return self.language.graph

    @property
    def current_plan(self) -> Any:
        return self.language.current_plan

    @property
    def arena(self) -> Any:
        return self.language.arena

    def new_arena(self, memory: int | None) -> Any:
        """As `Runtime.new_arena`."""
        return self.language.new_arena(memory)

    def unserved(self) -> str | None:
        """As `Runtime.unserved`."""
        return self.language.unserved()

    def move(self) -> None:
        super().move()
        self.language.move()
        self._forget_towers()

    def rebind(self) -> None:
        super().rebind()
        self.language.rebind()
        self._forget_towers()

    def _forget_towers(self) -> None:
        for tower in self.towers.values():
            tower.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> MultimodalRuntime:
        twin = super().__deepcopy__(memo)
        twin.outer, twin.pace = copy.deepcopy(self.outer, memo), Pace()
        twin.language_model = copy.deepcopy(self.language_model, memo)
        twin.towers = {path: copy.deepcopy(plans, memo) for path, plans in self.towers.items()}
        return twin
