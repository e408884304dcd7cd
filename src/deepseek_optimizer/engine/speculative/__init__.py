"""Speculative decoding: a proposer drafts tokens, and one step of the model verifies all of them.

The output distribution is that of the model alone, see `sampling/verify.py`. The number of drafts is chosen from measurements,
see `draft_length`. Each proposer has its own file.
"""
