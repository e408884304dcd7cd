"""Preparation of a model instance for training: its modules get native forward methods, and `Prepared.undo` restores them.

The class of each supported module is replaced by a subclass, so that `isinstance`, names, parameters, hooks, `state_dict`,
adapters and saving keep working. Transformers and its classes are not modified. Unsupported modules stay unchanged and are
reported.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn

from ..integration.bind.instance_method import Replacement
from ..integration.bind.modules import Packed
from ..integration.compat import keep_layers, recompute_layers, recomputes_layers
from ..integration.training.modules import attention_name, set_attention_name
from .attention_function import DSO_TRAIN, register_train_attention
from .fp8.backend import Fp8Products
from .modules.attention import TrainedAttention
from .modules.compressed_attention import TrainedCompressedAttention, TrainedGroupedLinear
from .modules.distillation import Distillation
from .modules.draft_loss import DraftObjective
from .modules.embedding import TrainedEmbedding
from .modules.experts import TrainedExperts
from .modules.fp8_linear import TrainedFp8Linear, excluded_from_fp8
from .modules.head import TrainedCausalLM
from .modules.head_loss import head_is_fused
from .modules.layer import TrainedLayer
from .modules.linear import TrainedLinear
from .modules.mla import TrainedLatentAttention
from .modules.mlp import TrainedMlp
from .modules.mtp_layer import TrainedMtpLayer
from .modules.mtp_loss import MtpObjective
from .modules.norm import TrainedNorm
from .modules.streams import TrainedHyperConnection, TrainedHyperHead, TrainedStreamLayer
from .ops.triton_ops import note_for
from .saved_activations import SavedActivations

# Each has `fits(module)`, which recognizes a module by its attributes; the first that fits is used.
FORWARDS: Final[tuple[Any, ...]] = (
    TrainedCausalLM, TrainedLayer, TrainedStreamLayer, TrainedAttention, TrainedLatentAttention, TrainedCompressedAttention,
    TrainedExperts, TrainedMlp, TrainedNorm, TrainedHyperConnection, TrainedHyperHead, TrainedEmbedding, TrainedGroupedLinear,
    TrainedLinear,
)  # fmt: skip
_ATTENTIONS: Final = (TrainedAttention, TrainedLatentAttention)

ActivationMemory = Literal["full", "selective", "recompute"]


@dataclass
class Prepared:
    """A prepared model, and what is needed to restore it.

    Attributes:
        model: the model.
        saved: context manager for the forward pass; decides which activations are saved for the backward pass.
        native: number of modules with a native forward, by class name.
        others: number of other modules with weights, by class name.
        attention: name of the attention implementation.
        notes: what is not optimized and why, one sentence each.
        fused_loss: whether the loss is computed without the full logits.
    """

    model: Any
    saved: SavedActivations
    native: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    attention: str = ""
    notes: list[str] = field(default_factory=list)
    fused_loss: bool = False
    _classes: list[tuple[nn.Module, type, type]] = field(default_factory=list)
    _forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)
    _attentions: list[tuple[Any, str | None]] = field(default_factory=list)
    _checkpointed: bool = False

    def undo(self) -> None:
        """Restores the original classes; weights stay. A module whose class was changed again in the meantime keeps it."""
        for module, given, own in reversed(self._classes):
            if type(module) is given:
                module.__class__ = own
                module.__dict__.pop("saved", None)
                module.__dict__.pop("fp8", None)
                module.__dict__.pop("mtp", None)
                module.__dict__.pop("distillation", None)
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        for config, name in self._attentions:
            set_attention_name(config, name)
        if self._checkpointed:
            keep_layers(self.model)
        self._classes, self._forwards, self._attentions, self._checkpointed = [], [], [], False


def prepare(
    model: nn.Module,
    *,
    activation_memory: ActivationMemory = "selective",
    fused_loss: bool = True,
    mtp: MtpObjective | DraftObjective | None = None,
    fp8: Fp8Products | None = None,
    distillation: Distillation | None = None,
) -> Prepared:
    """Replaces the forward methods of a model's modules by native ones.

    Args:
        model: a Transformers model: plain, packed, or wrapped by PEFT.
        activation_memory: see `DeepSeekTrainingArguments`.
        fused_loss: compute the head and the loss together where possible.
        mtp: the loss of the model's MTP layers, which is added to the fused loss or replaces it.
        fp8: the FP8 products of linear layers and experts; None: no FP8.
        distillation: replaces the fused loss; None: no teacher.
    """
    exempt = excluded_from_fp8(model) if fp8 is not None else set()
    prepared = Prepared(model, SavedActivations(save_all=activation_memory == "full"))
    modules: list[Any] = list(model.modules())
    for module in modules:
        mixin = next((m for m in FORWARDS if isinstance(module, m) or m.fits(module)), None)
        if mixin is TrainedCausalLM and not fused_loss:
            mixin = None
        if mixin is TrainedLinear and fp8 is not None and id(module) not in exempt:
            mixin = TrainedFp8Linear
        if mixin is not None and _reachable(module, mixin, prepared):
            _replace_class(module, mixin, prepared)
            if mixin in (TrainedFp8Linear, TrainedExperts):
                module.fp8 = fp8
            if mixin is TrainedCausalLM:
                module.mtp, module.distillation = mtp, distillation
        elif not isinstance(module, (nn.Embedding, Packed)) and any(True for _ in module.parameters(recurse=False)):
            prepared.others[type(module).__name__] += 1
    for module in filter(TrainedMtpLayer.fits, modules):
        _change_class(module, TrainedMtpLayer, prepared)
        module.saved = prepared.saved
    _check_head(model, prepared)
    _set_attention(model, prepared)
    devices = dict.fromkeys(p.device for p in model.parameters())
    prepared.notes += [note for note in map(note_for, devices) if note is not None]
    if activation_memory == "recompute":
        _recompute_layers(model, prepared)
    return prepared


def _reachable(module: nn.Module, mixin: Any, prepared: Prepared) -> bool:
    """Whether the forward of the class would be called. The forward that a packed model has on the instance is removed."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    if mixin is TrainedCausalLM and isinstance(forward, Replacement):
        prepared._forwards.append((module, module.__dict__.pop("forward")))
        return True
    prepared.notes.append(f"a {type(module).__name__} has a forward on the instance, which is not replaced")
    return False


def _replace_class(module: Any, mixin: Any, prepared: Prepared) -> None:
    _change_class(module, mixin, prepared)
    module.saved = prepared.saved
    prepared.native[type(module).__name__] += 1


def _change_class(module: Any, mixin: Any, prepared: Prepared) -> None:
    own: Any = type(module)
    if isinstance(module, mixin):  # prepared before it was sharded: FSDP2 made a class of that one
        return
    given = _subclass(mixin, own)
    module.__class__ = given
    prepared._classes.append((module, given, own))


@functools.cache
def _subclass(mixin: type, own: type) -> type:
    """A subclass of both with the name of `own`, since saved configs contain the class name."""
    forward: Any = mixin.forward  # type: ignore[attr-defined]

    @functools.wraps(own.forward)  # type: ignore[attr-defined]
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:  # Trainer inspects the signature
        return forward(self, *args, **kwargs)

    names = {"__module__": own.__module__, "__doc__": own.__doc__, "__qualname__": own.__qualname__, "forward": signed}
    return type(own.__name__, (mixin, own), names)


def _check_head(model: nn.Module, prepared: Prepared) -> None:
    heads: list[Any] = [module.lm_head for module in model.modules() if isinstance(module, TrainedCausalLM)]
    prepared.fused_loss = bool(heads) and all(map(head_is_fused, heads))
    if heads and not prepared.fused_loss:
        prepared.notes.append("lm_head is trained through an adapter, so the full logits are computed")


def _set_attention(model: nn.Module, prepared: Prepared) -> None:
    """Selects the native attention in the config of every attention module, unless the model needs an unsupported feature."""
    attentions = [m for m in model.modules() if isinstance(m, _ATTENTIONS)]
    compressed = [m for m in model.modules() if isinstance(m, TrainedCompressedAttention)]
    configs: list[Any] = list({id(m.config): m.config for m in (*attentions, *compressed)}.values())
    reason = _why_not_native([*attentions, *compressed])
    prepared.attention = ", ".join(sorted({attention_name(c) or "eager" for c in configs})) or "unchanged"
    if reason is not None:
        prepared.notes.append(f"attention is {prepared.attention}: {reason}")
        return
    if compressed:
        return  # it takes Transformers' masks, so the name stays
    for config in configs:
        prepared._attentions.append((config, attention_name(config)))
        set_attention_name(config, DSO_TRAIN)
    prepared.attention = DSO_TRAIN


def _why_not_native(attentions: list[Any]) -> str | None:
    if not attentions:
        return "no attention module is supported"
    register_train_attention()
    if any(getattr(m, "attention_dropout", 0.0) for m in attentions):
        return "the model has attention_dropout, which dso_train does not support"
    return None


def _recompute_layers(model: Any, prepared: Prepared) -> None:
    if recomputes_layers(model):
        return  # enabled in Transformers already, with its own options
    if not getattr(model, "supports_gradient_checkpointing", False):
        prepared.notes.append(f"{type(model).__name__} has no gradient checkpointing, so all activations are saved")
        return
    recompute_layers(model)
    prepared._checkpointed = True


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters; a tied parameter occurs once."""
    return [p for p in model.parameters() if p.requires_grad]
