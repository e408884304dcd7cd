"""The interface of a weight format.

A packed matrix [N, K] is a uint8 tensor of shape [ceil(N/16), ceil(K/32), tile_bytes]: tiles of 16 rows x 32 columns, in the
layout of `native/include/dso.h`, which is the same on every ISA and on disk. Each format has one file, whose `pack` and
`unpack` are plain torch: they define the result that the native packer must equal bit for bit, and are used if there is no
native build.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch

TILE_ROWS, TILE_COLS = 16, 32
PANEL_ROWS = 128  # a panel packed separately begins at a multiple of this: the height of the tallest scaled block (fp8)


class Packer(Protocol):
    """A function that packs a matrix into tiles. Backends pass their own in; this package imports no backend.

    A panel of a matrix may be packed separately if it begins at a multiple of PANEL_ROWS.

    Args:
        weight: one of
            - a float matrix [N, K];
            - uint8: rows of ggml blocks whose values the format represents exactly (see `ggml.py`); repacked without rounding;
            - float8_e4m3fn [N, K], with `scale`; stored unchanged as "fp8".
        name: of the format.
        out: where to write the tiles, contiguous and of their shape; None: a new tensor.
        importance: float32 [K], finite and not negative: the weight of an error in each column. int3, int4 and q4_1 choose
            their scales by it (`search.py`); other formats ignore it.
        scale: of float8 weights, float32 [ceil(N/128), ceil(K/128)].

    Returns: uint8 tiles [ceil(N/16), ceil(K/32), tile_bytes].
    """

    def __call__(
        self,
        weight: torch.Tensor,
        name: str,
        out: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


Parameters = tuple[torch.Tensor, ...]  # what a group of 32 columns has besides its codes, such as a scale: [n] each, as stored


class CodedGroups(Protocol):
    """A format whose groups of 32 columns can be rounded one by one, as compensated rounding does (`compensation.py`).

    Columns come first: x is float32 [32, n], one group of n rows, and a part of it [k, n].

    Attributes:
        run: the number of columns that are rounded together, a divisor of 32; 1 if each element has a code of its own.
    """

    run: ClassVar[int]

    @staticmethod
    def values(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """The values of codes, float32 [k, n]: float32 [k, n], what `unpack` returns for them."""

    @staticmethod
    def tiles(codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Packs codes, int16 [N, K], with parameters [N, K/32] each: uint8 [ceil(N/16), K/32, tile_bytes]."""


@runtime_checkable
class WholeGroups(CodedGroups, Protocol):
    """`CodedGroups` whose 32 codes depend on each other, so that they are chosen together; `run` is 32."""

    @staticmethod
    def rounded(x: torch.Tensor, importance: torch.Tensor, packer: Packer) -> tuple[torch.Tensor, Parameters]:
        """Chooses parameters and codes, integers [32, n], of x [32, n] such that the error weighted by importance, float32
        [32], is small. `packer` packs the format."""


class GroupFormat(CodedGroups, Protocol):
    """`CodedGroups` whose codes are chosen for given parameters."""

    @staticmethod
    def fit(x: torch.Tensor, importance: torch.Tensor) -> Parameters:
        """Chooses the parameters of x [32, n] such that the error weighted by importance, float32 [32], is small."""

    @staticmethod
    def refit(x: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor) -> Parameters:
        """The parameters with the smallest weighted error of x [32, n] for given codes, float32 [32, n]."""

    @staticmethod
    def codes(x: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """The codes nearest to x [k, n] for given parameters; k is a multiple of `run`. float32 [k, n]."""

    @staticmethod
    def parameters(tiles: torch.Tensor) -> Parameters:
        """The parameters in tiles, uint8 [t, g, tile_bytes]: [16 t, g] each."""


class WeightFormat(Protocol):
    """One format.

    Attributes:
        name: as users write it.
        code: DSO_* of dso.h.
        tile_bytes: bytes of a tile.
        bits: bits per weight, scales included.
        activation: the kind of activation that its products read: "f32", "bf16", "q8" or "q16".
    """

    name: ClassVar[str]
    code: ClassVar[int]
    tile_bytes: ClassVar[int]
    bits: ClassVar[float]
    activation: ClassVar[str]

    @staticmethod
    def pack(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """float [N, K] -> uint8 [ceil(N/16), ceil(K/32), tile_bytes]. `importance`: see `Packer`."""

    @staticmethod
    def unpack(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 tiles -> float [rows, cols]; exact in float32."""

    @staticmethod
    def error_bound(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
        """An upper bound of |unpack(pack(w, importance)) - w| for each element, float [N, K]."""
