"""`generate` of a multimodal model: the prompt by the whole model, all later tokens by the plan of its language model."""

from __future__ import annotations

from ..generation.generate import PlanGenerate


class WholeGenerate(PlanGenerate):
    """As `PlanGenerate`; the runtime is that of the whole model, which has the language model's plan and cache."""
