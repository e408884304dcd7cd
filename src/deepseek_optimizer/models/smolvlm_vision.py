"""SmolVLM's vision tower: that of SigLIP, with other positions of patches."""

from __future__ import annotations

from . import siglip_vision_model
from .fields import Fields
from .vision import Tower


def build(fields: Fields) -> Tower:
    return siglip_vision_model.build(fields, "smolvlm_vision")
