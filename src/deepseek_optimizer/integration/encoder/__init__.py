"""Encoders with an execution plan: bound as on the general path, with a plan that computes the base model's hidden states."""

from .bind import bind
from .runtime import EncoderRuntime

__all__ = ["EncoderRuntime", "bind"]
