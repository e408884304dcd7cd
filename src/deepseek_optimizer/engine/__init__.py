"""What goes on between a request and a plan: sequences, steps over many of them, the choice of tokens, drafts.

No torch here but in `runner` and `sampler`. Nothing knows Transformers.
"""
