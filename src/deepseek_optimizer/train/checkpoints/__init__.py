"""Atomic, verified training checkpoints without pickled files.

A checkpoint `checkpoint-<step>` has the contents of a checkpoint of Transformers' Trainer, with these differences:
`checkpoint.json` lists every file with its length and SHA-256 (`manifest.py`); the states of optimizer, scheduler and random
generators are safetensors and JSON (`state.py`); `training_args.json` replaces `training_args.bin`.
"""

from .saving import AtomicCheckpoints

__all__ = ["AtomicCheckpoints"]
