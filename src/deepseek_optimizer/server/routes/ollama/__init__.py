"""The routes of Ollama's API, under /api."""

from . import chat, embed, generate, models, pool

__all__ = ["chat", "embed", "generate", "models", "pool"]
