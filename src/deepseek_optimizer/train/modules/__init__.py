"""What of Transformers' modules is trained by forwards of our own: one kind of module a file, each with `fits`, which knows a module by
what it has, not by its name."""
