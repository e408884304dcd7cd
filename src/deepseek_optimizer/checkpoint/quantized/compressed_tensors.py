"""compressed-tensors, as LLM Compressor writes it: integer weights, packed or one per byte, and FP8 weights.

Of a layer [N, K] with G groups (1: per channel), a checkpoint stores

| `format` | tensors |
|---|---|
| pack-quantized | `weight_packed` I32 [N, K * bits / 32], codes plus 2^(bits-1), packed along K; `weight_shape` [2]; asymmetric: `weight_zero_point`, packed alike but along N, I32 [N * bits / 32, G]; `weight_g_idx` [K] if columns are grouped in the order of activations |
| int-quantized | `weight` I8 [N, K]; asymmetric: `weight_zero_point` I8 [N, G] |
| float-quantized | `weight` F8_E4M3 [N, K] (`fp8.py`) |

and `weight_scale` [N, G], or one scale. W = scale * (code - zero). Bits, groups and symmetry follow from the tensors; the config's
`config_groups` must contain them. Scales of activations are not used. Source: compressed-tensors (`compressors/`).
"""  # noqa: E501  # a table row

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import shown
from .fp8 import E4M3, Fp8Matrix
from .integers import IntegerMatrix, IntegerTensors, groups_of
from .matrix import QuantizedMatrix
from .section import Section
from .tensors import SCALES, StoredTensors, check_shape, wrong
from .words import BITS, words_for

_NAME = "compressed-tensors"
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_INTEGERS = ("I32", "I64")
_FIELDS = (
    "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "sparsity_config", "transform_config",
    "global_compression_ratio", "version", "run_compressed", "moe_sparsity_config",
)  # fmt: skip


@dataclass(frozen=True)
class _Scheme:
    """The `weights` of a config group."""

    bits: int
    floats: bool
    size: int | None
    block: tuple[int, int] | None


def find_compressed_tensors(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The quantized layers of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    section.one_of("format", _FORMATS, "dense")
    _check_sparsity(section)
    if section.fields.get("transform_config"):
        raise section.unsupported("transform_config", "rotates weights or activations, which is not supported")
    schemes = _schemes(section)
    found: dict[str, QuantizedMatrix] = {}
    for layer in tensors.names(".weight_packed"):
        found[f"{layer}.weight"] = _packed(layer, schemes, tensors)
    block = next((scheme.block for scheme in schemes if scheme.block is not None), None)
    for name in [name for name, info in tensors.left.items() if name.endswith(".weight") and info.dtype in ("I8", E4M3)]:
        if tensors.left[name].dtype == "I8":
            found[name] = _bytes(name, tensors)
        else:
            weight = tensors.take(name, (E4M3,), 2)
            scale = tensors.take(f"{name}_scale", SCALES, owner=weight)
            found[name] = Fp8Matrix(weight, scale, None if scale.shape in ((weight.shape[0], 1), (1,), ()) else block, tensors)
    return found


def _check_sparsity(section: Section) -> None:
    sparsity = section.fields.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        raise section.unsupported("sparsity_config", f"is {shown(sparsity)}; sparse formats are not supported")


def _schemes(section: Section) -> list[_Scheme]:
    groups = section.fields.get("config_groups")
    if not isinstance(groups, dict):
        raise section.unsupported("config_groups", f"is {shown(groups)}; it must be an object")
    return [_scheme(section, f"config_groups.{name}", group) for name, group in groups.items()]


def _scheme(section: Section, name: str, group: Any) -> _Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise section.unsupported(name, f"is {shown(group)}; it must have weights")
    bits: Any = weights.get("num_bits")
    kind, size = weights.get("type"), weights.get("group_size")
    if (kind, bits) not in (*(("int", b) for b in BITS), ("float", 8)):
        raise section.unsupported(
            f"{name}.weights", f"are {shown(kind)} of {shown(bits)} bits; supported: int of 2, 4 and 8, float of 8"
        )
    if size is not None and (type(size) is not int or not (0 < size < 1 << 31 or size == -1)):
        raise section.unsupported(f"{name}.weights.group_size", f"is {shown(size)}; it must be a number of columns")
    block = section.block(f"{name}.weights.block_structure", weights.get("block_structure"))
    return _Scheme(bits, kind == "float", None if size == -1 else size, block)


def _packed(layer: str, schemes: list[_Scheme], tensors: StoredTensors) -> QuantizedMatrix:
    weight = tensors.take(f"{layer}.weight_packed", ("I32",), 2)
    scales = tensors.take(f"{layer}.weight_scale", SCALES, owner=weight)
    given = tensors.take(f"{layer}.weight_shape", _INTEGERS, 1, owner=weight)
    check_shape(given, (2,), "a shape of two sizes")
    rows, cols = (int(size) for size in tensors.read(given))
    fitting = [s for s in schemes if not s.floats and cols > 0 and (rows, words_for(cols, s.bits)) == weight.shape]
    if not fitting:
        raise wrong(weight, f"has shape {weight.shape}, which is not that of {rows} x {cols} packed weights of config_groups")
    groups = groups_of(scales, rows, cols)
    sizes = {s.bits: s.size for s in fitting if s.size is None or -(-cols // s.size) == groups}
    if not sizes or (groups > 1 and not any(sizes.values())):
        raise wrong(scales, f"has shape {scales.shape}, which fits no group_size of config_groups with {rows} x {cols} weights")
    bits, size = next((b, s) for b, s in sizes.items() if groups == 1 or s is not None)
    zeros = tensors.optional(f"{layer}.weight_zero_point", ("I32", "I8"))
    if zeros is not None and zeros.dtype == "I32":
        check_shape(zeros, (words_for(rows, bits), groups), f"{bits}-bit packed zero points of {rows} rows in {groups} groups")
    group_of = tensors.optional(f"{layer}.weight_g_idx", _INTEGERS, 1)
    check_shape(group_of, (cols,), f"a matrix of {cols} columns")
    stored = IntegerTensors(weight, scales, zeros, group_of, given)
    return IntegerMatrix(stored, bits, cols if size is None or groups == 1 else size, (rows, cols), tensors, _NAME)


def _bytes(name: str, tensors: StoredTensors) -> QuantizedMatrix:
    weight = tensors.take(name, ("I8",), 2)
    scales = tensors.take(f"{name}_scale", SCALES, owner=weight)
    zeros = tensors.optional(f"{name}_zero_point", ("I8",))
    rows, cols = weight.shape
    size = cols // groups_of(scales, rows, cols)
    return IntegerMatrix(IntegerTensors(weight, scales, zeros), 8, size, (rows, cols), tensors, _NAME)
