"""Forwards of our own for Transformers' modules in training: one kind of module a file, each with `fits`, which knows a module
by what it has, not by its name."""
