"""Registers the task "conversational" with Transformers' pipelines, at the latest when these are imported, which takes half a
second and more."""

from __future__ import annotations

from typing import Any

from ..integration.when_imported import when_imported

TASK = "conversational"


def _register(pipelines: Any) -> None:
    from .pipelines import ConversationalPipeline, Unloaded

    if TASK not in pipelines.PIPELINE_REGISTRY.supported_tasks:
        pipelines.PIPELINE_REGISTRY.register_pipeline(TASK, ConversationalPipeline, pt_model=Unloaded, type="text")


def register_task() -> None:
    """More than once does no harm."""
    when_imported("transformers.pipelines", "PIPELINE_REGISTRY", _register)
