"""`PackedLinear` and `PackedEmbedding`: replace Transformers' modules and own the packed weights. Experts are in
`packed_experts.py`.

Weights exist once: a plan binds the modules' storage. Each module also has its own forward, differentiable in its input, for
calls that the plan does not serve: training adapters, inner hooks, attention weights.

`weight` is a uint8 parameter of tiles (see `quant/base.py`), so `state_dict`, `save_pretrained` and weight tying work as usual.
The classes derive from torch's modules, so that PEFT, which looks for `nn.Linear`, wraps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, UnsupportedRequestError
from ...quant import SUPERBLOCKS, ColumnOrder, PackedMatrix, PackedWeight, get_format, take_rows, unpack
from ...quant.base import TILE_ROWS
from ...quant.blocks import SUPERBLOCK
from ...quant.products import linear, linear_gradient
from ...quant.tiles import tile_counts
from ...quant.transposed_stack import StackLayout

# (x [..., K], W, bias [N] or None) -> float32 [..., N]
Product = Callable[[torch.Tensor, PackedMatrix, "torch.Tensor | None"], torch.Tensor]
# (dL/dy [..., N], W) -> float32 dL/dx [..., K]
Gradient = Callable[[torch.Tensor, PackedMatrix], torch.Tensor]


def unchecked(tensor: torch.Tensor) -> None:
    """The default of `Packed.check_tensor`, for weights in ordinary memory: checks nothing."""


class Packed(nn.Module):
    """Base class of the packed modules.

    Attributes:
        dtype: floating point type of the surrounding model; casts to another one are refused.
        layout: how checkpoints store the weights, see `quant/transposed_stack.py`; "columns": a matrix is stored as [K, N].
        check_tensor: raises CheckpointChangedError if a tensor lies in a mapped file that was modified; set by the runtime.
            Native products check by themselves; reads of the weights by torch are checked here.
    """

    dtype: torch.dtype
    layout: StackLayout = "rows"
    check_tensor: Callable[[torch.Tensor], None] = staticmethod(unchecked)

    def held(self) -> dict[str, PackedWeight]:
        """The packed weights by parameter name in this module."""
        raise NotImplementedError

    def intact(self, read: Any) -> Any:
        """Returns `read`, a value computed from the weights, after checking that the weights' files are unmodified."""
        for weight in self.held().values():
            self.check_tensor(weight.data)
        return read

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._refuse_casts(fn)
        return super()._apply(fn, recurse)

    def _refuse_casts(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Tiles have no other dtype, and casting only the other parameters (norms, biases) would be partial."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if wanted != self.dtype:
            formats = ", ".join(dict.fromkeys(weight.format for weight in self.held().values()))
            raise UnsupportedRequestError(
                f"the model's weights are packed as {formats} and cannot be cast from {self.dtype} to {wanted}; "
                f"load the original checkpoint with dtype={wanted}, or with another precision"
            )


def empty_tiles(rows: int, cols: int, format_name: str, device: Any, count: tuple[int, ...] = ()) -> nn.Parameter:
    """Uninitialized tiles of a matrix, or of a stack of `count` matrices, as a uint8 parameter without gradient.

    Raises:
        ConfigError: the format needs whole superblocks, and `cols` is no multiple of them.
    """
    if format_name in SUPERBLOCKS and cols % SUPERBLOCK:
        raise ConfigError(
            f"{format_name} needs a multiple of {SUPERBLOCK} columns, but a matrix has {cols}; choose int4 or int8 for it"
        )
    shape = (*count, *tile_counts(rows, cols), get_format(format_name).tile_bytes)
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)


class PackedProduct(torch.autograd.Function):
    """y = product(x, W); dL/dx = gradient(dL/dy, W) = dL/dy @ W. W itself has no gradient.

    If the format rounds activations, the gradient ignores it (straight-through estimator).
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
        bias: whether to add a bias (float [N]).
        dtype: floating point type of the surrounding model and of the bias.
        device: where the uninitialized weight is allocated.

    Attributes:
        weight: uint8 [ceil(N/16), ceil(K/32), tile_bytes], without gradient.
        order: of the columns in it, see `PackedMatrix`.
        product, gradient: functions that compute x W^T and the gradient in x; the runtime sets the backend's.
    """

    weight: nn.Parameter
    order: ColumnOrder | None = None

    def __init__(
        self, in_features: int, out_features: int, format: str, *, bias: bool = False, dtype: torch.dtype, device: Any = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a float weight
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, format, dtype
        self._parameters["weight"] = empty_tiles(out_features, in_features, format, device)
        # Frozen like the weights: an optimized model is for inference, and adapters have their own parameters.
        value = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", value)
        self.product: Product = linear
        self.gradient: Gradient = linear_gradient
        self._is_hf_initialized = True  # weights are loaded, never initialized at random

    @property
    def packed(self) -> PackedMatrix:
        tiles = self._parameters["weight"]
        assert tiles is not None
        return PackedMatrix(self.format, self.out_features, self.in_features, tiles.data, self.order)

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


class PackedGroupedLinear(PackedLinear):
    """Replaces `DeepseekV4GroupedLinear`: y_g = x_g W_g^T for each group g, where W_g are consecutive rows of W.

    Attributes:
        n_groups: number of groups, named as in Transformers' module.
    """

    n_groups: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., n_groups, K] -> [..., n_groups, N / n_groups]."""
        rows, parts = self.out_features // self.n_groups, []
        for group, x in enumerate(input.unbind(-2)):
            begin, end = group * rows, (group + 1) * rows
            first, last = begin // TILE_ROWS, -(-end // TILE_ROWS)  # tiles that hold the group's rows
            count = min(last * TILE_ROWS, self.out_features) - first * TILE_ROWS
            part = PackedMatrix(self.format, count, self.in_features, self.packed.data[first:last])
            y: torch.Tensor = PackedProduct.apply(x, part, self.product, self.gradient)
            parts.append(y[..., begin - first * TILE_ROWS : end - first * TILE_ROWS])
        return torch.stack(parts, -2)


class PackedEmbedding(Packed, nn.Embedding):
    """Look-up of rows in a packed table [num_embeddings, embedding_dim]; further arguments as in `PackedLinear`.

    Attributes:
        weight: uint8 tiles, shared with a tied output head.
        scale: factor of the rows, rounded to `dtype` as Gemma's embeddings do.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str,
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.dtype, self.scale = format, dtype, scale
        self.weight = empty_tiles(num_embeddings, embedding_dim, format, device)
        self._is_hf_initialized = True

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.format, self.num_embeddings, self.embedding_dim, self.weight.data)

    def held(self) -> dict[str, PackedWeight]:
        return {"weight": self.packed}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.intact(take_rows(self.packed, input, self.dtype))
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The table as float [num_embeddings, embedding_dim]."""
        return self.intact(unpack(self.packed, dtype))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"
