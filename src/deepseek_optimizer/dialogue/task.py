"""Registers the task "conversational" for Transformers' pipelines."""

from __future__ import annotations

from transformers.pipelines import PIPELINE_REGISTRY

from .pipelines import ConversationalPipeline, Unloaded

TASK = "conversational"


def register_task() -> None:
    """Registers the task. May be called more than once."""
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, ConversationalPipeline, pt_model=Unloaded, type="text")
