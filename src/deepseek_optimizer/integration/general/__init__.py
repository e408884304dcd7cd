"""The general path: models without an execution plan, whose linear layers run on our kernels inside Transformers' forward."""

from .head import head_name
from .names import renamed_for, stored_as
from .runtime import GeneralRuntime, bind
from .settings import check_settings, encoder_reason, is_encoder, needs_a_plan, why_general
from .swap import pack_in_place, packable_layers, packs_experts, swap_on_meta

__all__ = [
    "GeneralRuntime",
    "bind",
    "check_settings",
    "encoder_reason",
    "head_name",
    "is_encoder",
    "needs_a_plan",
    "pack_in_place",
    "packable_layers",
    "packs_experts",
    "renamed_for",
    "stored_as",
    "swap_on_meta",
    "why_general",
]
