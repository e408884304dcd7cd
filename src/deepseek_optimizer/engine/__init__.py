"""The inference engine: requests, continuous batching, sampling, and speculative decoding over a compiled plan.

Only `runner` and `sampler` import torch. Nothing here depends on Transformers.
"""
