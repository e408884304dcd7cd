"""What rounding the weights costs by itself: they are put back, dequantized, into Transformers' own fp32 model.

Every matrix of the model is rounded but the routers: linear layers, experts, the embedding and the head. ggml's types are made
by gguf-py's own quantizer. Calibration and evaluation share no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gguf
import torch
from torch import nn

from deepseek_optimizer import DeepSeekConfig
from deepseek_optimizer.backends.registry import choose_backend
from deepseek_optimizer.bench.quality import Divergence, Logits, through_prefill
from deepseek_optimizer.calibration.statistics import ColumnSquares
from deepseek_optimizer.quant import Packer, get_format, pack, unpack

Round = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # W, importance of its columns or None -> W'


class Reference:
    """A model's distributions on some texts, computed once and held: 4 bytes a token and a word of the vocabulary.

    Args:
        texts: ids int64 [1, n] each.
    """

    def __init__(self, model: Any, texts: Sequence[torch.Tensor]) -> None:
        self._texts, self._logits = texts, [through_prefill(model, ids) for ids in texts]

    def compare(self, model: Any, logits: Logits = through_prefill) -> dict[str, float]:
        """`Divergence.summary` of another model on the same texts."""
        divergence = Divergence()
        for ids, reference in zip(self._texts, self._logits, strict=True):
            divergence.add(logits(model, ids), reference, ids[0])
        return divergence.summary()


def measured(
    model: Any, evaluation: Sequence[torch.Tensor], calibration: Sequence[torch.Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Name of a way to round -> bits a weight, and `Divergence.summary` of the evaluation text.

    Args:
        model: in fp32; its weights are overwritten.
        evaluation, calibration: ids int64 [1, n] each.
    """
    backend, _ = choose_backend(DeepSeekConfig(), torch.device("cpu"))
    reference, importance = Reference(model, evaluation), importance_of(model, calibration)
    targets = matrices(model)
    originals = {name: matrix.clone() for name, matrix in targets.items()}
    for name, round_by, bits, calibrated in _ways(backend.pack):
        for matrix, target in targets.items():
            target.copy_(round_by(originals[matrix], importance.get(matrix) if calibrated else None))
        yield name, {"bits": bits, **reference.compare(model)}


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """Every matrix that is rounded, by name: views of the parameters, tied ones once."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            found[f"{name}.weight"] = module.weight.data
        elif _is_experts(module):
            for stack in ("gate_up_proj", "down_proj"):
                found |= {f"{name}.{stack}.{i}": matrix for i, matrix in enumerate(getattr(module, stack).data)}
    return {name: m for name, m in found.items() if name not in (model.all_tied_weights_keys or {})}


def importance_of(model: Any, texts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The importance of columns (`calibration/statistics.py`) in a model that is not ours."""
    columns, tied = ColumnSquares(), model.all_tied_weights_keys or {}
    linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    experts = {n: m for n, m in model.named_modules() if _is_experts(m)}
    handles = [m.register_forward_pre_hook(partial(_add_experts, columns, name)) for name, m in experts.items()]
    with torch.inference_mode(), columns.watching({tied.get(name, name): m for name, m in linear.items()}):
        for ids in texts:
            model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return columns.importance()


def _is_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)  # all experts' in one parameter [E, 2 I, H]


def _add_experts(columns: ColumnSquares, name: str, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
    """What each expert reads: the tokens routed to it, and its own gated activations."""
    hidden, chosen = arguments[:2]
    for i in chosen.unique().tolist():
        rows = hidden[(chosen == i).any(-1)]
        gate, up = nn.functional.linear(rows, module.gate_up_proj[i]).chunk(2, -1)
        columns.add(f"{name}.gate_up_proj.{i}", rows)
        columns.add(f"{name}.down_proj.{i}", module.act_fn(gate) * up)


def _ways(packer: Packer) -> Iterator[tuple[str, Round, float, bool]]:
    for ggml, ours in (("Q4_0", "int4"), ("Q4_1", "q4_1")):
        bits = get_format(ours).bits
        yield f"{ggml} by gguf-py", partial(_by_gguf, gguf.GGMLQuantizationType[ggml]), bits, False
        yield ours, partial(_by_us, packer, ours), bits, False
        yield f"{ours}, calibrated", partial(_by_us, packer, ours), bits, True


def _by_gguf(kind: gguf.GGMLQuantizationType, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))


def _by_us(packer: Packer, format: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    return unpack(pack(weight, format, packer, importance))
