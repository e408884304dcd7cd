"""`PackedLinear` and `PackedEmbedding`: they stand where Transformers' modules stood and own the packed weights.
`packed_experts.py` has the third.

Weights live here once; a plan binds the same storage. Each module also has a forward of its own, correct and differentiable
in its input, for what the plan does not serve: training of adapters, inner hooks, attention weights.

`weight` is a uint8 parameter of tiles (see `quant/base.py`), so `state_dict`, `save_pretrained` and tying work as ever. Both
are subclasses of torch's modules, so that PEFT, which looks for `nn.Linear`, wraps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedRequestError
from ...quant import PackedMatrix, PackedWeight, get_format, take_rows, unpack
from ...quant.products import linear, linear_gradient
from ...quant.tiles import tile_counts

# (x [..., K], W, bias [N] or None) -> float32 [..., N]
Product = Callable[[torch.Tensor, PackedMatrix, "torch.Tensor | None"], torch.Tensor]
# (dL/dy [..., N], W) -> float32 dL/dx [..., K]
Gradient = Callable[[torch.Tensor, PackedMatrix], torch.Tensor]


def unchecked(tensor: torch.Tensor) -> None:
    """`Packed.check_tensor` where weights are in memory."""


class Packed(nn.Module):
    """What the packed modules have in common.

    Attributes:
        dtype: floating point type of the model around, which a cast is measured against.
        check_tensor: raises CheckpointChangedError where a tensor lies in a mapped file that is not what it was; set by the
            runtime. Native products ask by themselves; what torch reads of the weights is asked for here.
    """

    dtype: torch.dtype
    check_tensor: Callable[[torch.Tensor], None] = staticmethod(unchecked)

    def held(self) -> dict[str, PackedWeight]:
        """The packed weights, by the parameter's name in this module."""
        raise NotImplementedError

    def intact(self, read: Any) -> Any:
        """What was `read` of the weights, once they are found to be what was loaded."""
        for weight in self.held().values():
            self.check_tensor(weight.data)
        return read

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Refuses a cast: tiles have no other dtype, and to cast only what is left (norms, biases) would be half a cast."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if wanted != self.dtype:
            formats = ", ".join(dict.fromkeys(weight.format for weight in self.held().values()))
            raise UnsupportedRequestError(
                f"this model's weights are packed as {formats}, so it cannot be cast from {self.dtype} to {wanted}; "
                f"load the original again with dtype={wanted}, or with another precision"
            )
        return super()._apply(fn, recurse)


def empty_tiles(rows: int, cols: int, format_name: str, device: Any, count: tuple[int, ...] = ()) -> nn.Parameter:
    """Uninitialised tiles of a matrix, or of a stack of `count`, as a parameter without gradient."""
    shape = (*count, *tile_counts(rows, cols), get_format(format_name).tile_bytes)
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)


class PackedProduct(torch.autograd.Function):
    """y = product(x, W); dL/dx = gradient(dL/dy, W) = dL/dy @ W. W itself has no gradient.

    Rounding of the activations, where the format has any, is passed straight through.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: PackedMatrix, product: Product, gradient: Gradient) -> torch.Tensor:
        ctx.matrix, ctx.dtype, ctx.gradient = matrix, x.dtype, gradient
        return product(x, matrix, None).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.gradient(grads[0], ctx.matrix).to(ctx.dtype), None, None, None


class PackedLinear(Packed, nn.Linear):
    """y = x W^T + b with W packed.

    Args:
        in_features, out_features: K and N.
        format: name of the weight format.
        bias: whether there is one (float, [N]).
        dtype: floating point type of the model around; of the bias, and what a cast is measured against.
        device: where the empty weight is made.

    Attributes:
        weight: uint8 [ceil(N/16), ceil(K/32), tile_bytes], without gradient.
        product, gradient: how x W^T and the gradient in x are computed; the runtime sets the backend's.
    """

    weight: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, format: str, *, bias: bool = False, dtype: torch.dtype, device: Any = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, format, dtype
        self.weight = empty_tiles(out_features, in_features, format, device)
        # Frozen like the weights: an optimised model is for inference, and adapters bring parameters of their own.
        made = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", made)
        self.product: Product = linear
        self.gradient: Gradient = linear_gradient
        self._is_hf_initialized = True  # weights are loaded, never drawn

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.format, self.out_features, self.in_features, self.weight.data)

    def held(self) -> dict[str, PackedWeight]:
        return {"weight": self.packed}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = PackedProduct.apply(input, self.packed, self.product, self.gradient)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W as float [N, K]."""
        return self.intact(unpack(self.packed, dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}"


class PackedEmbedding(Packed, nn.Embedding):
    """Row look-up in a packed table [num_embeddings, embedding_dim]; arguments as `PackedLinear`'s.

    Attributes:
        weight: uint8 tiles, which a tied output head may share.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.dtype = format, dtype
        self.weight = empty_tiles(num_embeddings, embedding_dim, format, device)
        self._is_hf_initialized = True

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.format, self.num_embeddings, self.embedding_dim, self.weight.data)

    def held(self) -> dict[str, PackedWeight]:
        return {"weight": self.packed}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.intact(take_rows(self.packed, input, self.dtype))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The table as float."""
        return self.intact(unpack(self.packed, dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"
