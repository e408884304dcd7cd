"""Garbage: weights that are not finite, wrong kernels, too coarse a quantization, or the tokenizer of another model. Each is
measured on a paragraph of plain English.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError
from ..case import Case
from ..finding import Finding
from ..memory_estimate import estimate_memory
from .base import Symptom

NAME = "garbage"
TEXT = (
    "The sun is a star at the centre of the solar system. The planets, among them the Earth, move around it, and the Moon "
    "moves around the Earth. Light from the sun takes about eight minutes to reach us. Plants use this light to grow, and "
    "animals eat plants or other animals. Without the sun there would be no life on Earth."
)
CHANCE = 0.9  # of ln(vocabulary): above it, a model predicts English no better than chance
KERNEL_KL = 0.05  # nats: ten times what 8-bit activations cost on SmolLM2 (0.003) and more
QUANTIZED_KL = 1.0  # nats: int4 costs 0.4 on SmolLM2, whose text is still good
NOTABLE_KL = 0.1  # nats: reported as a note


def measure(case: Case) -> Iterator[Finding]:
    """Checks the weights, then the logits, then compares them with the reference backend and with unquantized weights."""
    damaged = list(_weights(case))
    yield from damaged
    if damaged:
        return  # the model cannot be loaded
    ids = _ids(case)
    own = _logits(case.load(), ids)
    finding = judge_text(_loss(own, ids), own, case)
    yield finding
    if not math.isnan(finding.facts["loss"]):
        yield judge_kernels(_divergence(_logits(case.load(backend="reference"), ids), own), case)
        yield from _quantization(case, own, ids)


def _weights(case: Case) -> Iterator[Finding]:
    """Reads every tensor once; yields a finding for the first with a value that is not finite."""
    from ...quant.tiles import panels

    checkpoint = case.checkpoint
    for name in checkpoint.tensors:
        try:
            shape = checkpoint.shape(name)
            if len(shape) == 2 and checkpoint.kind != "packed":  # packed tensors are unpacked whole
                for begin, end in panels(*shape):
                    checkpoint.check_finite(name, checkpoint.read_rows(name, begin, end))
            else:
                checkpoint.check_finite(name, checkpoint.read(name))
        except CheckpointError as error:
            yield Finding(
                NAME, "error", f"{name} is damaged", str(error),
                "download the file again; if you created it, training or conversion overflowed (fp16 ends at 65,504): use bf16",
                {"tensor": name},
            )  # fmt: skip
            return


def judge_text(loss: float, logits: Any, case: Case) -> Finding:
    """Whether the model predicts plain English better than chance."""
    chance = math.log(case.sketch.config.vocab_size)
    facts = {"loss": loss, "perplexity": math.exp(min(loss, 700)) if not math.isnan(loss) else None, "chance_loss": chance}
    if math.isnan(loss):
        bad = int((~logits.isfinite()).sum())
        return Finding(
            NAME, "error", f"{bad} of {logits.numel()} logits are not finite, though all weights are",
            "a value overflowed: activations exceed the range of their format, or a kernel is faulty",
            "try activation='int16', then backend='reference'; report it if only the native backend does this", facts,
        )  # fmt: skip
    if loss > CHANCE * chance:
        return Finding(
            NAME, "error", f"the model predicts plain English no better than chance: loss {loss:.2f}, chance {chance:.2f}",
            "the tokenizer belongs to another model, the weights are damaged or untrained, or it was trained on other "
            "languages",
            "use tokenizer and weights from the same source, and compare their checksums", facts,
        )  # fmt: skip
    what = f"the model predicts plain English: perplexity {math.exp(loss):.1f} (chance {math.exp(chance):,.0f})"
    return Finding(NAME, "ok", what, facts=facts)


def judge_kernels(kl: float, case: Case) -> Finding:
    """Whether the backend computes the same as plain torch with the same weights."""
    facts = {"kl_to_reference": kl, "allowed": KERNEL_KL}
    if not kl <= KERNEL_KL:  # NaN fails too
        return Finding(
            NAME, "error", f"the native kernels disagree with plain torch on the same weights: KL {kl:.3g}",
            "a kernel is faulty on this CPU, or 8 bits are too few for the activations",
            "use activation='int16' if that lowers it; else backend='reference', and report it with the output of "
            "`dso info`", facts,
        )  # fmt: skip
    return Finding(NAME, "ok", f"the kernels agree with plain torch on the same weights: KL {kl:.2g}", facts=facts)


def _quantization(case: Case, own: Any, ids: Any) -> Iterator[Finding]:
    """Compares with the weights as stored, if the settings quantize them further and both fit into memory."""
    precision = case.settings.precision
    if case.checkpoint.kind == "packed":
        yield Finding(NAME, "note", "the effect of packing cannot be measured: the original weights are not available")
    elif precision != "auto":
        whole = sum(info.nbytes for info in case.checkpoint.tensors.values())
        if whole > estimate_memory(case).free:
            yield Finding(
                NAME, "note", f"the effect of {precision} cannot be measured here", "the stored weights do not fit in "
                "memory together with the model", "",
                {"bytes": whole},
            )  # fmt: skip
        else:
            yield judge_quantization(_divergence(_logits(case.load(precision="auto"), ids), own), precision)


def judge_quantization(kl: float, precision: str) -> Finding:
    """Whether the quantized model predicts the same as the stored weights."""
    facts = {"kl_to_stored": kl, "allowed": QUANTIZED_KL, "precision": precision}
    if not kl <= QUANTIZED_KL:
        return Finding(
            NAME, "error", f"{precision} changes the model's predictions: KL {kl:.2f} from the stored weights",
            "its weights have outliers that so few bits cannot represent", "use precision='int8', or 'auto' for no loss", facts,
        )  # fmt: skip
    if kl > NOTABLE_KL:
        return Finding(
            NAME, "note", f"{precision} costs KL {kl:.2f} from the stored weights", "small models are more sensitive to "
            "quantization",
            "precision='int8' costs less, 'auto' nothing", facts,
        )  # fmt: skip
    return Finding(NAME, "ok", f"{precision} is close to the stored weights: KL {kl:.2g}", facts=facts)


def _ids(case: Case) -> Any:
    """The paragraph's tokens, int64 [1, T], truncated to the model's context."""
    return case.tokenizer(TEXT, return_tensors="pt")["input_ids"][:, : case.graph.max_positions]


def _logits(model: Any, ids: Any) -> Any:
    """float32 [T, V]; frees the model before another one is loaded."""
    import torch

    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0].float()
    del model
    gc.collect()
    return logits


def _loss(logits: Any, ids: Any) -> float:
    """Mean negative log likelihood of the tokens after the first, in nats; NaN if any logit is not finite."""
    import torch

    if not logits.isfinite().all():
        return math.nan
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))


def _divergence(p: Any, q: Any) -> float:
    """Mean KL(p || q) over the rows, in nats."""
    import torch

    return float(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"))


SYMPTOM = Symptom(measure, checks=("tokenizer",))
