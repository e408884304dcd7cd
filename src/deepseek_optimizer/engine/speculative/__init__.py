"""Speculative decoding: a proposer drafts some tokens, one step of the model verifies them all, and those that hold are kept.

The text is the model's own: see `sampling/verify.py`. How many drafts pay is measured: see `gate`. One proposer a file.
"""
