"""Models with a vision tower: their language model runs as a plan, and Transformers computes the rest over packed layers."""

from .bind import bind
from .encode import PictureEncoder, embeddings_of, is_multimodal, language_model_of
from .parts import is_whole, language_config, why_no_language_plan
from .swap import pack_in_place, swap_on_meta

__all__ = [
    "PictureEncoder",
    "bind",
    "embeddings_of",
    "is_multimodal",
    "is_whole",
    "language_config",
    "language_model_of",
    "pack_in_place",
    "swap_on_meta",
    "why_no_language_plan",
]
