"""Training with matrix products in FP8 (DeepSeek-V3 report, arXiv 2412.19437, section 3.3).

The three products of a linear layer (forward, gradient of the input, gradient of the weight) have 8-bit operands. Each tile has
its own scale, computed online: 1 x 128 along the summed dimension for activations and gradients, 128 x 128 for weights. Sums
are in fp32. Weights have bf16 and fp32 master copies; sensitive modules stay in bf16: embedding, head, routers, norms,
attention and adapters.

Scales are powers of two, as in DeepSeek's checkpoints since V3.1 ("ue8m0"). A code times its scale is then exact in bf16, so
the emulation is an ordinary bf16 product of values on the FP8 grid, with the same terms as on a tensor core. In a
floating-point format a power-of-two scale costs no precision, only up to one exponent at the lower end of the range.
"""

from .backend import Fp8Products, choose

__all__ = ["Fp8Products", "choose"]
