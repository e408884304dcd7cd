"""AWQ: 4 bits, groups of columns with zero points, in the packing order of its GEMM kernels.

Of a layer [N, K] with G groups, a checkpoint stores

| tensor | shape | contains |
|---|---|---|
| `qweight` | I32 [K, N / 8] | codes, packed along N |
| `qzeros` | I32 [G, N / 8] | zero points, packed along N |
| `scales` | F16 [G, N] | |

and W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = k // group_size. From its lowest bits upwards, a word contains
rows 0, 2, 4, 6, 1, 3, 5, 7 of its eight. Source: AutoAWQ (`WQLinear_GEMM.from_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...quant.tiles import panels
from .. import base
from ..base import TensorInfo
from .affine import AffineRows, formats_of, group_label
from .matrix import QuantizedMatrix
from .section import Section
from .tensors import SCALES, StoredTensors, check_shape
from .words import lanes, unpack_words, words_for

BITS = 4
_FIELDS = (
    "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format", "pack_dtype",
    # How the codes were found, and how they are to be run: nothing that changes what is stored.
    "backend", "damp_percent", "desc_act", "do_fuse", "exllama_config", "fuse_max_seq_len", "lm_head", "meta",
    "model_file_base_name", "model_name_or_path", "modules_to_fuse", "static_groups", "sym", "true_sequential",
)  # fmt: skip
_GEMM = ("gemm", "GEMM", "awq")


def find_awq(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The AWQ layers of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    section.one_of("w_bit" if "w_bit" in section.fields else "bits", (BITS,), BITS)
    size = section.group_size("q_group_size" if "q_group_size" in section.fields else "group_size", 128)
    section.one_of("zero_point", (True,), True)
    section.one_of("pack_dtype", ("int32",), "int32")
    for field in ("version", "format", "checkpoint_format"):
        section.one_of(field, _GEMM, "gemm")
    return awq_layers(tensors, size)


def awq_layers(tensors: StoredTensors, size: int) -> dict[str, QuantizedMatrix]:
    """The layers that are stored as AWQ stores them, with groups of `size` columns (-1: whole rows), by the name of their
    weight."""
    found: dict[str, QuantizedMatrix] = {}
    for layer in tensors.names(".qweight"):
        weight = tensors.take(f"{layer}.qweight", ("I32",), 2)
        scales = tensors.take(f"{layer}.scales", SCALES, 2, owner=weight)
        zeros = tensors.take(f"{layer}.qzeros", ("I32",), 2, owner=weight)
        found[f"{layer}.weight"] = AwqMatrix(weight, zeros, scales, size, tensors)
    return found


class AwqMatrix(QuantizedMatrix):
    """An AWQ layer's weight, of its stored tensors and the group size (-1: whole rows)."""

    def __init__(self, weight: TensorInfo, zeros: TensorInfo, scales: TensorInfo, size: int, tensors: StoredTensors) -> None:
        cols, (groups, rows) = weight.shape[0], scales.shape
        self._weight, self._zeros, self._scales, self._tensors = weight, zeros, scales, tensors
        self._size = cols if size == -1 else size
        label = f"AWQ {BITS}-bit, {group_label(self._size, cols)}"
        check_shape(weight, (cols, words_for(rows, BITS)), f"{label}, {rows} x {cols}")
        check_shape(scales, (-(-cols // self._size), rows), f"{label}, {rows} x {cols}")
        check_shape(zeros, (groups, words_for(rows, BITS)), f"{label}, {rows} x {cols}")
        self.lossless, self.natural = formats_of(BITS, symmetric=False, kept=self._size % 32 == 0 or groups == 1)
        super().__init__(label, (rows, cols), (weight, zeros, scales))

    def rows(self, begin: int, end: int) -> AffineRows:
        first, last, skipped = lanes(begin, end, BITS)
        return self._decode(self._tensors.columns(self._weight, first, last), skipped, begin, end)

    def panels(self, begin: int, end: int) -> Iterator[tuple[int, int, AffineRows]]:
        start, stop, _ = lanes(begin, end, BITS)
        words = self._tensors.columns(self._weight, start, stop)
        for top, bottom in panels(end - begin, self.shape[1], base.PANEL_ELEMENTS):
            first, last, skipped = lanes(begin + top, begin + bottom, BITS)
            yield top, bottom, self._decode(words[:, first - start : last - start], skipped, begin + top, begin + bottom)

    def _decode(self, words: torch.Tensor, skipped: int, begin: int, end: int) -> AffineRows:
        """Rows [begin, end) from the words that contain them, whose first `skipped` rows are others."""
        tensors = self._tensors
        first, last, _ = lanes(begin, end, BITS)
        zeros = _unpack(tensors.columns(self._zeros, first, last))[:, skipped : skipped + end - begin]
        codes = _unpack(words)[:, skipped : skipped + end - begin].t().contiguous()
        scales = tensors.finite(self._scales, tensors.columns(self._scales, begin, end)).t().contiguous()
        return AffineRows(codes, scales, zeros.t().to(torch.int16), 0, self._size)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, w] -> uint8 [n, 8 w], in the order of rows: a word has first the even rows of its eight, then the odd ones."""
    return unpack_words(words, BITS).view(words.shape[0], -1, 2, 4).transpose(2, 3).flatten(1)
