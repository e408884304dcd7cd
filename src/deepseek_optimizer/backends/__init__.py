"""Backends: one graph, the same answers. `base.py` is what each offers."""
