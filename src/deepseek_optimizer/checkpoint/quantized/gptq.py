"""GPTQ: 2, 4 or 8 bits, groups of columns, possibly in the order of activations.

Of a layer [N, K] with G groups, a checkpoint stores

| tensor | shape | contains |
|---|---|---|
| `qweight` | I32 [K * bits / 32, N] | codes, packed along K |
| `qzeros` | I32 [G, N * bits / 32] | zero points, packed along N: less 1 in `checkpoint_format` "gptq", not in "gptq_v2" |
| `scales` | F16 [G, N] | |
| `g_idx` | I32 [K] | the group of each column; absent: k // group_size |

and W[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]. "gptq" subtracts 1 from each packed zero point as one
32-bit subtraction, in which a zero point of 0 borrows from the next; adding it back with carries inverts that. Source: AutoGPTQ
and GPTQModel (`QuantLinear.pack`, `convert_gptq_v1_to_v2_format`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...quant.tiles import panels
from .. import base
from ..base import TensorInfo
from .affine import AffineRows, formats_of, group_label
from .matrix import QuantizedMatrix
from .section import Section
from .tensors import SCALES, StoredTensors, check_shape
from .words import BITS, lanes, unpack_words, words_for

_FIELDS = (
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "is_marlin_format", "pack_dtype", "dynamic",
    "lm_head",
    # How the codes were found, and how they are to be run: nothing that changes what is stored.
    "act_group_aware", "adapter", "amp", "autoround_version", "backend", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "cache_examples_on_gpu", "damp_auto_increment", "damp_percent", "data_type", "dataset",
    "disable_exllama", "enable_full_range", "enable_minmax_tuning", "enable_quanted_input", "exllama_config",
    "gradient_accumulate_steps", "hyb_act", "iters", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "mse", "nsamples", "pad_token_id", "parallel_packing", "provider", "quantizer",
    "scale_dtype", "seqlen", "static_groups", "tokenizer", "train_bs", "true_sequential", "use_cuda_fp16", "use_exllama",
    "v2", "v2_alpha",
)  # fmt: skip
_ONES = {bits: sum(1 << at for at in range(0, 32, bits)) for bits in BITS}  # a 1 in every place of a word


def find_gptq(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The GPTQ layers of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    bits = section.one_of("bits", BITS)
    size = section.group_size()
    symmetric = section.flag("sym", True)
    section.one_of("pack_dtype", ("int32",), "int32")
    section.one_of("is_marlin_format", (False,), False)
    named = "checkpoint_format" if section.fields.get("checkpoint_format") is not None else "format"
    version = section.one_of(named, ("gptq", "gptq_v2"), "gptq")
    per_layer = bool(section.fields.get("dynamic"))
    return gptq_layers(tensors, bits, size, symmetric, version == "gptq", per_layer)


def gptq_layers(
    tensors: StoredTensors, bits: int, size: int, symmetric: bool, minus_one: bool, per_layer: bool
) -> dict[str, QuantizedMatrix]:
    """The layers that are stored as GPTQ stores them, by the name of their weight.

    Args:
        tensors: the checkpoint's.
        bits, size: of a code, and columns of a group (-1: whole rows).
        symmetric: whether all zero points are the middle code.
        minus_one: whether zero points are stored less 1.
        per_layer: whether some layers may have other bits and group sizes, which their tensors tell.
    """
    found: dict[str, QuantizedMatrix] = {}
    for layer in tensors.names(".qweight"):
        stored = _take(layer, tensors, bits, size, per_layer)
        found[f"{layer}.weight"] = GptqMatrix(stored, symmetric, minus_one, tensors)
    return found


@dataclass(frozen=True)
class _Stored:
    """The tensors of a layer, with what their shapes imply."""

    weight: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    group_of: TensorInfo | None
    bits: int
    size: int
    cols: int


def _take(layer: str, tensors: StoredTensors, bits: int, size: int, per_layer: bool) -> _Stored:
    weight = tensors.take(f"{layer}.qweight", ("I32",), 2)
    scales = tensors.take(f"{layer}.scales", SCALES, 2, owner=weight)
    zeros = tensors.take(f"{layer}.qzeros", ("I32",), 2, owner=weight)
    group_of = tensors.optional(f"{layer}.g_idx", ("I32", "I64"), 1)
    groups, rows = scales.shape
    if per_layer:
        fitting = [b for b in BITS if zeros.shape == (groups, words_for(rows, b))]
        bits = bits if bits in fitting or not fitting else fitting[0]
    cols = group_of.shape[0] if group_of is not None else weight.shape[0] * 32 // bits
    size = cols if size == -1 else size
    if per_layer and -(-cols // size) != groups:
        size = -(-cols // groups)
    label = f"{bits}-bit GPTQ with groups of {size}, {rows} x {cols},"
    check_shape(weight, (words_for(cols, bits), rows), label)
    check_shape(zeros, (groups, words_for(rows, bits)), label)
    check_shape(scales, (-(-cols // size), rows), label)
    return _Stored(weight, zeros, scales, group_of, bits, size, cols)


class GptqMatrix(QuantizedMatrix):
    """A GPTQ layer's weight.

    Args:
        stored: its tensors.
        symmetric: whether all zero points are the middle code, as the config says.
        minus_one: whether zero points are stored one less.
        tensors: reads them.
    """

    def __init__(self, stored: _Stored, symmetric: bool, minus_one: bool, tensors: StoredTensors) -> None:
        self._stored, self._minus_one, self._tensors = stored, minus_one, tensors
        ordered = stored.scales.shape[0] > 1 and self._group_of() is not None
        label = f"GPTQ {stored.bits}-bit, {group_label(stored.size, stored.cols)}{', in activation order' if ordered else ''}"
        kept = not ordered and (stored.size % 32 == 0 or stored.scales.shape[0] == 1)
        self.lossless, self.natural = formats_of(stored.bits, symmetric, kept)
        infos = (stored.weight, stored.zeros, stored.scales, stored.group_of)
        super().__init__(label, (stored.scales.shape[1], stored.cols), tuple(info for info in infos if info is not None))

    def rows(self, begin: int, end: int) -> AffineRows:
        return self._decode(self._words(begin, end), begin, end, self._group_of())

    def panels(self, begin: int, end: int) -> Iterator[tuple[int, int, AffineRows]]:
        words, group_of = self._words(begin, end), self._group_of()
        for top, bottom in panels(end - begin, self._stored.cols, base.PANEL_ELEMENTS):
            yield top, bottom, self._decode(words[:, top:bottom], begin + top, begin + bottom, group_of)

    def _words(self, begin: int, end: int) -> torch.Tensor:
        return self._tensors.columns(self._stored.weight, begin, end)

    def _decode(self, words: torch.Tensor, begin: int, end: int, group_of: torch.Tensor | None) -> AffineRows:
        stored, tensors = self._stored, self._tensors
        codes = unpack_words(words.t(), stored.bits)[:, : stored.cols]
        scales = tensors.finite(stored.scales, tensors.columns(stored.scales, begin, end)).t().contiguous()
        first, last, skipped = lanes(begin, end, stored.bits)
        zeros = tensors.columns(stored.zeros, first, last)
        if self._minus_one:
            zeros = (zeros.long() + _ONES[stored.bits]).to(torch.int32)  # with carries, modulo 2^32
        zeros = unpack_words(zeros, stored.bits)[:, skipped : skipped + end - begin]
        return AffineRows(codes, scales, zeros.t().to(torch.int16), 0, stored.size, group_of)

    def _group_of(self) -> torch.Tensor | None:
        return self._tensors.group_of_columns(self._stored.group_of, self._stored.size, self._stored.scales.shape[0])
