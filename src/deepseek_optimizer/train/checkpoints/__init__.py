"""Checkpoints of training that a crash cannot spoil: written beside, checked, renamed at once; nothing in them is pickled.

A checkpoint `checkpoint-<step>` holds what Transformers' Trainer puts there, with these differences: `checkpoint.json` lists
every file with its length and SHA-256 (`manifest.py`); optimizer, scheduler and random numbers are safetensors and JSON
(`state.py`); `training_args.json` takes the place of `training_args.bin`.
"""

from .saving import AtomicCheckpoints

__all__ = ["AtomicCheckpoints"]
