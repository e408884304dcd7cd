"""Attention and masks that are registered with Transformers for models that run its own modules."""
