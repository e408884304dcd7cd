"""Chat templates of models whose checkpoints have none: DeepSeek publishes the prompts of V3.2 and V4 as Python programs."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("chat_templates")
_FILES = {"deepseek_v32": "deepseek-v3.2", "deepseek_v4": "deepseek-v4"}


def published_template(model_type: object) -> str | None:
    """The Jinja source of the prompts of a model type; None: its checkpoints have a template of their own.

    Args:
        model_type: as in the checkpoint's config.json.
    """
    name = _FILES.get(model_type) if isinstance(model_type, str) else None
    return None if name is None else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
