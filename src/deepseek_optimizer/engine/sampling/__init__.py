"""Sampling: choosing tokens from logits."""
