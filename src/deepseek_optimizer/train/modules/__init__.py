"""Native forward methods for Transformers' modules in training. Each class is a mixin; its `fits` recognizes a supported module
by its attributes, not by its name."""
