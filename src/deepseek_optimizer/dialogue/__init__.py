"""Conversations as a Transformers pipeline."""
