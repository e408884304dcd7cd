"""GGUF files of a small Llama whose matrices are random blocks of ggml's types.

path.write_bytes(llama_file({"": "Q4_K", "ffn_down": "Q6_K"}))
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from .checkpoint_files import ARRAY, F32, STRING, U32, gguf_bytes, gguf_tensor, model_values

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB, LAYERS = 256, 4, 2, 512, 83, 2
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,)} | dict.fromkeys(("Q4_K", "Q5_K", "Q5_1"), (0, 2))

CENTRES = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5, "Q5_1": -15.5}  # the minimum that centres codes, in scales


def random_blocks(shape: tuple[int, int], kind: str, generator: torch.Generator) -> np.ndarray:
    """Random codes and scales of a matrix, uint8 [rows, bytes], whose weights have a mean near 0 and a deviation of 0.03.

    Minimums are those that centre a group's codes: others would make a model whose logits depend on rounding errors.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = torch.randint(0, 256, (shape[0], shape[1] // block, size), dtype=torch.uint8, generator=generator)
    if kind in ("Q4_K", "Q5_K"):  # 6-bit minimums equal to the scales
        blocks[..., 8:12] = blocks[..., 4:8]
        blocks[..., 12:16] = (blocks[..., 12:16] & 15) * 17
    elif kind == "Q2_K":
        blocks[..., :16] = (blocks[..., :16] & 15) * 17
    elif kind == "MXFP4":
        blocks[..., 0] = 119 + blocks[..., 0] % 3
        return blocks.view(shape[0], -1).numpy()
    numbers = 0.75 + 0.5 * torch.rand(*blocks.shape[:2], 1, generator=generator)

    def fill(factor: float) -> None:
        for at, ratio in zip(HALVES.get(kind, (0,)), (1.0, CENTRES.get(kind, 1.0)), strict=False):
            blocks[..., at : at + 2] = (numbers * factor * ratio).half().view(torch.uint8)

    fill(1.0)
    spread = float(quants.dequantize(blocks.view(shape[0], -1).numpy(), GGMLQuantizationType[kind]).std())
    fill(0.03 / spread)
    return blocks.view(shape[0], -1).numpy()


def llama_file(kinds: Mapping[str, str], seed: int = 0) -> bytes:
    """The file.

    Args:
        kinds: ggml type by the last part of a tensor's name ("ffn_down", "token_embd"); "": of all other matrices.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    head_dim = HIDDEN // HEADS
    values = model_values(
        "llama",
        LAYERS,
        llama__embedding_length=(U32, HIDDEN),
        llama__feed_forward_length=(U32, INTERMEDIATE),
        llama__attention__head_count=(U32, HEADS),
        llama__attention__head_count_kv=(U32, KV_HEADS),
        llama__rope__dimension_count=(U32, head_dim),
        tokenizer__ggml__tokens=(ARRAY, (STRING, [f"t{i}" for i in range(VOCAB)])),
        tokenizer__ggml__scores=(ARRAY, (F32, [0.0] * VOCAB)),
    )
    shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        block = {
            "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV_HEADS * head_dim, HIDDEN), "attn_v": (KV_HEADS * head_dim, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    norms = ["output_norm", *(f"blk.{i}.{name}" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm"))]
    tensors = [gguf_tensor(f"{name}.weight", 1 + 0.1 * torch.randn(HIDDEN, generator=generator)) for name in norms]
    for name, shape in shapes.items():
        kind = kinds.get(name.split(".")[-1], kinds[""])
        if kind in ("F32", "F16", "BF16"):
            tensors.append(gguf_tensor(f"{name}.weight", torch.randn(shape, generator=generator) * 0.06, kind))
            continue
        data = random_blocks(shape, kind, generator)
        tensors.append((f"{name}.weight", int(GGMLQuantizationType[kind]), tuple(reversed(shape)), data.tobytes()))
    return gguf_bytes(values, tensors)
