"""Attention functions and masks for plain Transformers models."""
