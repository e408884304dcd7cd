"""Pruning: smaller models made by leaving out layers, channels, heads and experts that matter least on a text.

`depth`, `channels`, `heads` and `experts` are criteria, one per file; `families` says which tensors they cut; `write` writes an
ordinary Transformers checkpoint, tensor by tensor; `job` is a run of `dso prune`.
"""
