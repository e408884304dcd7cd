"""Binds a multimodal model with packed layers: the general path for the whole, and a plan for its language model."""

from __future__ import annotations

from typing import Any

from ...config import DeepSeekConfig
from .. import general
from ..model import bind_plan
from .forward import LanguageForward
from .language_model import LanguageModel
from .parts import multimodal
from .runtime import MultimodalRuntime
from .tower_forward import plan_towers


def bind(model: Any, config: DeepSeekConfig, no_plan: str, **options: Any) -> Any:
    """`general.bind`, and the plans of the language model and the vision tower.

    Args:
        model, config, no_plan, options: as in `general.bind`. `no_plan` concerns the parts besides the language model.
    """
    kind = multimodal(model.config)
    assert kind is not None
    general.bind(model, config, no_plan, kind=MultimodalRuntime, **options)
    whole: MultimodalRuntime = model.dso
    language: Any = LanguageModel(model)
    bind_plan.bind(language, config)
    language.dso.share(whole)
    whole.language_model = language
    text = model.config.get_text_config()
    own = kind.bidirectional is None or text.use_bidirectional_attention == kind.bidirectional
    language.model.__dict__["forward"] = LanguageForward(language.dso, whole.outer, kind.token_types if own else "")
    whole.towers, whole.no_tower_plan = plan_towers(whole, model)
    return model
