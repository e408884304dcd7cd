"""Training with products in FP8, after DeepSeek-V3's report (arXiv 2412.19437, section 3.3).

The three products of a linear layer (forward, gradient of the input, gradient of the weight) multiply 8-bit numbers. Each tile
of them has a scale of its own, made as the tile comes: 1 x 128 along the summed dimension for activations and gradients,
128 x 128 for weights. Sums run in fp32. Weights have bf16 and fp32 masters beside them, and what is sensitive stays in bf16:
embedding, head, routers, norms, attention itself, adapters.

Scales are powers of two, as DeepSeek publishes them since V3.1 ("ue8m0"): a code times its scale is then exact in bf16, so the
emulation is an ordinary bf16 product of values on the FP8 grid, with the same terms as on a tensor core. In a floating point
format such a scale costs no precision, only up to one of the exponents at the lower end.
"""

from .backend import Fp8Products, choose

__all__ = ["Fp8Products", "choose"]
