"""The inference engine: requests, continuous batching, sampling, and speculative decoding over a compiled plan.

Only `runner`, `picture_steps` and `sampling.torch_sampler` import torch. Nothing here depends on Transformers.
"""
