"""Native forward methods for Transformers' modules in training. Each class is a mixin; its `fits` recognises a supported module
by its attributes, not by its name."""
