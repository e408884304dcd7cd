"""Binds a Transformers model to an execution plan: packed modules, graphs, the runtime."""
