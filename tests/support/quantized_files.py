"""Packers of other quantizers' checkpoints, written from the published layouts, one per method.

Each takes a float matrix [N, K] and returns the stored tensors by suffix (".qweight") and the values that they stand for,
float32: code minus zero point, times the scale of the weight's group.

copy = quantized_copy(float_folder, target, gptq, SECTIONS["gptq"], bits=4, size=32)    # a whole checkpoint
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]

SECTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb_int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def compressed_section(format: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one config group."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def grid(weight: torch.Tensor, bits: int, group_of: np.ndarray, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Any, ...]:
    """Round-to-nearest codes [N, K] in [0, 2^bits - 1], scales [N, G] as float32, and zero points [N, G]."""
    w, top = weight.float().numpy(), (1 << bits) - 1
    groups = int(group_of.max()) + 1
    scales, zeros = np.zeros((len(w), groups), np.float32), np.zeros((len(w), groups), np.int64)
    for g in range(groups):
        low, high = np.minimum(w[:, group_of == g].min(1), 0), np.maximum(w[:, group_of == g].max(1), 0)
        scales[:, g] = np.maximum(-low, high) * 2 / top if symmetric else (high - low) / top
        zeros[:, g] = (top + 1) // 2 if symmetric else np.rint(-low / scales[:, g])
    scales = torch.from_numpy(scales).to(scale_dtype).float().numpy()
    codes = np.clip(np.rint(w / scales[:, group_of]) + zeros[:, group_of], 0, top).astype(np.int64)
    return codes, scales, zeros


def affine(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray) -> torch.Tensor:
    """scale * (code - zero), float32."""
    return torch.from_numpy(scales[:, group_of] * (codes - zeros[:, group_of]).astype(np.float32))


def in_order(cols: int, size: int) -> np.ndarray:
    return np.arange(cols) // (cols if size == -1 else size)


def into_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [n, ceil(m * bits / 32)]: integers of a row side by side from the lowest bit on."""
    each = 32 // bits
    words = np.zeros((codes.shape[0], -(-codes.shape[1] // each)), np.uint32)
    for j in range(codes.shape[1]):
        words[:, j // each] |= codes[:, j].astype(np.uint32) << np.uint32(bits * (j % each))
    return words


def words_tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32).copy())


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    ordered: bool = False,
    version: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    g_idx: bool = True,
) -> Packed:
    """`ordered`: columns join groups in a random order. `version` 1 stores zero points less one, with borrows."""
    group_of = in_order(weight.shape[1], size)
    if ordered:
        group_of = group_of[np.random.default_rng(weight.shape[0]).permutation(len(group_of))]
    codes, scales, zeros = grid(weight, bits, group_of, symmetric, scale_dtype)
    packed_zeros = into_words(zeros.T, bits)
    if version == 1:
        packed_zeros = packed_zeros - np.uint32(sum(1 << at for at in range(0, 32, bits)))
    tensors = {
        ".qweight": words_tensor(into_words(codes, bits).T),
        ".qzeros": words_tensor(packed_zeros),
        ".scales": torch.from_numpy(scales.T.copy()).to(scale_dtype),
    }
    if g_idx:
        tensors[".g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return tensors, affine(codes, scales, zeros, group_of)


def awq(weight: torch.Tensor, size: int = 32) -> Packed:
    """Rows 0, 2, 4, 6, 1, 3, 5, 7 of each eight in one word."""
    group_of = in_order(weight.shape[1], size)
    codes, scales, zeros = grid(weight, 4, group_of, False, torch.float16)
    order = [8 * i + row for i in range(len(codes) // 8) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {
        ".qweight": words_tensor(into_words(codes.T[:, order], 4)),
        ".qzeros": words_tensor(into_words(zeros.T[:, order], 4)),
        ".scales": torch.from_numpy(scales.T.copy()).half(),
    }
    return tensors, affine(codes, scales, zeros, group_of)


def pack_quantized(
    weight: torch.Tensor,
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    ordered: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Packed:
    """compressed-tensors, integers packed along each row; zero points along the rows."""
    group_of = in_order(weight.shape[1], size)
    if ordered:
        group_of = group_of[np.random.default_rng(weight.shape[0]).permutation(len(group_of))]
    codes, scales, zeros = grid(weight, bits, group_of, symmetric, scale_dtype)
    tensors = {
        ".weight_packed": words_tensor(into_words(codes, bits)),
        ".weight_scale": torch.from_numpy(scales).to(scale_dtype),
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words_tensor(into_words(zeros.T, bits).T)
    if ordered:
        tensors[".weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return tensors, affine(codes, scales, zeros, group_of)


def int_quantized(
    weight: torch.Tensor, size: int = -1, symmetric: bool = True, scale_dtype: torch.dtype = torch.bfloat16
) -> Packed:
    """compressed-tensors, an int8 per weight."""
    group_of = in_order(weight.shape[1], size)
    codes, scales, zeros = grid(weight, 8, group_of, symmetric, scale_dtype)
    tensors = {
        ".weight": torch.from_numpy((codes - 128).astype(np.int8)),
        ".weight_scale": torch.from_numpy(scales).to(scale_dtype),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = torch.from_numpy((zeros - 128).astype(np.int8))
    return tensors, affine(codes, scales, zeros, group_of)


def float_quantized(
    weight: torch.Tensor, per_row: bool = True, suffix: str = ".weight_scale", scale_dtype: torch.dtype = torch.float32
) -> Packed:
    """FP8 with a scale per row, or one of shape [1]."""
    w = weight.float()
    largest = w.abs().amax(1, keepdim=True) if per_row else w.abs().max().view(1)
    scale = (largest / 448).to(scale_dtype)
    codes = (w / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, suffix: scale}, codes.float() * scale.float()


# The quantiles of a normal distribution that Dettmers et al. 2023, "QLoRA", appendix E, lists; and bitsandbytes' fp4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))


def bitsandbytes_4bit(
    weight: torch.Tensor, kind: str = "nf4", nested: bool = True, block: int = 64, storage: torch.dtype = torch.uint8
) -> Packed:
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    flat = weight.float().flatten()
    blocks = [flat[i : i + block] for i in range(0, len(flat), block)]
    maxima = torch.stack([b.abs().max() for b in blocks])
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors: dict[str, torch.Tensor] = {}
    if nested:
        offset, codebook = maxima.mean(), torch.linspace(-1, 1, 256)
        centred = maxima - offset
        outer = torch.stack([centred[i : i + 256].abs().max() for i in range(0, len(centred), 256)])
        codes = torch.stack([(codebook - c / outer[i // 256]).abs().argmin() for i, c in enumerate(centred)])
        maxima = torch.stack([codebook[c] * outer[i // 256] for i, c in enumerate(codes)]) + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
        tensors |= {
            ".weight.absmax": codes.to(torch.uint8),
            ".weight.nested_absmax": outer,
            ".weight.nested_quant_map": codebook,
        }
    else:
        tensors[".weight.absmax"] = maxima
    codes = torch.cat([(table - x).abs().argmin(1) for x in [(b / m)[:, None] for b, m in zip(blocks, maxima, strict=True)]])
    values = torch.cat([table[c] * m for c, m in zip(codes.split(block), maxima, strict=True)]).view(weight.shape)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % (2 * storage.itemsize))).to(torch.uint8)
    tensors[".weight"] = (codes[::2] << 4 | codes[1::2]).view(storage)[:, None]
    tensors[".weight.quant_map"] = table
    tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    return tensors, values


def bitsandbytes_int8(weight: torch.Tensor) -> Packed:
    largest = weight.float().abs().amax(1)
    codes = (weight.float() * (127 / largest[:, None])).round().to(torch.int8)
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (largest / 127)[:, None]


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(stack: torch.Tensor) -> Packed:
    """Of a stack [E, N, K]; suffixes "_blocks" and "_scales"."""
    table = torch.tensor(E2M1)
    groups = stack.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - table).abs().argmin(-1)
    values = (table[codes] * torch.exp2(exponents)[..., None]).flatten(-2)
    codes = codes.to(torch.uint8)
    return {"_blocks": codes[..., 1::2] << 4 | codes[..., ::2], "_scales": (exponents + 127).to(torch.uint8)}, values


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], section: dict[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    """A directory with these tensors and nothing else that a model needs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": section}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return folder


def quantized_copy(
    source: Path, target: Path, packer: Callable[..., Packed], section: dict[str, Any], **options: Any
) -> tuple[Path, Path]:
    """Two copies of a float checkpoint: one whose linear layers are quantized, except for the head, and a float32 one with
    the values that it stands for."""
    plain = target.with_name(f"{target.name}-float")
    for folder in (target, plain):
        shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj.weight" in name:
            parts, values[name] = packer(tensor, **options)
            stored |= {name.removesuffix(".weight") + suffix: part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name], values[name] = tensor, tensor.float()
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    save_file({name: v.contiguous() for name, v in values.items()}, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return target, plain
