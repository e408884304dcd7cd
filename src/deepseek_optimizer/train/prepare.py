"""Preparing ONE model for training: its modules take forwards of ours, and give them back.

A module gets a subclass of its own class, so that `isinstance`, names, parameters, hooks, `state_dict`, adapters and saving go
on as ever; the class itself and Transformers stay as they are. What no forward of ours fits stays Transformers' own, and is
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
from .attention import DSO_TRAIN, register_train_attention
from .fp8.backend import Fp8Products
from .kept import Kept
from .modules.attention import TrainedAttention
from .modules.embedding import TrainedEmbedding
from .modules.experts import TrainedExperts
from .modules.fp8_linear import TrainedFp8Linear, kept_from_fp8
from .modules.head import TrainedCausalLM
from .modules.head_loss import head_is_fused
from .modules.layer import TrainedLayer
from .modules.linear import TrainedLinear
from .modules.mla import TrainedLatentAttention
from .modules.mlp import TrainedMlp
from .modules.mtp_loss import MtpObjective
from .modules.norm import TrainedNorm

# Each with `fits(module)`, which knows a module by what it has; the first that fits is taken.
FORWARDS: Final[tuple[Any, ...]] = (
    TrainedCausalLM, TrainedLayer, TrainedAttention, TrainedLatentAttention, TrainedExperts, TrainedMlp, TrainedNorm,
    TrainedEmbedding, TrainedLinear,
)  # fmt: skip
_ATTENTIONS: Final = (TrainedAttention, TrainedLatentAttention)

ActivationMemory = Literal["full", "selective", "recompute"]


@dataclass
class Prepared:
    """A model that is prepared, and the way back.

    Attributes:
        kept: to be entered around the forward: what it keeps for the backward.
        ours: how many modules have a forward of ours, by the name of their class.
        theirs: the same of modules with weights that have not.
        attention: name of the attention that runs.
        notes: what is not as it could be, and why, as sentences.
    """

    model: Any
    kept: Kept
    ours: Counter[str] = field(default_factory=Counter)
    theirs: Counter[str] = field(default_factory=Counter)
    attention: str = ""
    notes: list[str] = field(default_factory=list)
    fused_loss: bool = False
    _classes: list[tuple[nn.Module, type, type]] = field(default_factory=list)
    _forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)
    _attentions: list[tuple[Any, str | None]] = field(default_factory=list)
    _checkpointed: bool = False

    def undo(self) -> None:
        """The model as it was, with the weights it has now. A module whose class somebody else has changed since keeps it."""
        for module, given, own in self._classes:
            if type(module) is given:
                module.__class__ = own
                module.__dict__.pop("kept", None)
                module.__dict__.pop("fp8", None)
                module.__dict__.pop("mtp", None)
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
    mtp: MtpObjective | None = None,
    fp8: Fp8Products | None = None,
) -> Prepared:
    """Gives a model's modules forwards of ours.

    Args:
        model: a Transformers model, plain, packed, or with PEFT's adapters around it.
        activation_memory: see `DeepSeekTrainingArguments`.
        fused_loss: whether the loss is made with the head, where that can be.
        mtp: the loss of the model's MTP layers, which the fused loss then holds too.
        fp8: how products of linear layers and experts run in FP8; None: they don't.
    """
    exempt = kept_from_fp8(model) if fp8 is not None else set()
    done = Prepared(model, Kept(everything=activation_memory == "full"))
    modules: list[Any] = list(model.modules())
    for module in modules:
        mixin = next((m for m in FORWARDS if m.fits(module)), None)
        if mixin is TrainedCausalLM and not fused_loss:
            mixin = None
        if mixin is TrainedLinear and fp8 is not None and id(module) not in exempt:
            mixin = TrainedFp8Linear
        if mixin is not None and _reachable(module, mixin, done):
            _take(module, mixin, done)
            if mixin in (TrainedFp8Linear, TrainedExperts):
                module.fp8 = fp8
            if mixin is TrainedCausalLM:
                module.mtp = mtp
        elif not isinstance(module, (nn.Embedding, Packed)) and any(True for _ in module.parameters(recurse=False)):
            done.theirs[type(module).__name__] += 1
    _see_head(model, done)
    _attend(model, done)
    if activation_memory == "recompute":
        _checkpoint(model, done)
    return done


def _reachable(module: nn.Module, mixin: Any, done: Prepared) -> bool:
    """Whether a forward of the class would be called. A packed model's plan stands before it: it steps aside."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    if mixin is TrainedCausalLM and isinstance(forward, Replacement):
        done._forwards.append((module, module.__dict__.pop("forward")))
        return True
    done.notes.append(f"a {type(module).__name__} has a forward of its own on the instance, which stays")
    return False


def _take(module: Any, mixin: Any, done: Prepared) -> None:
    own: Any = type(module)
    given = _subclass(mixin, own)
    module.__class__ = given
    module.kept = done.kept
    done._classes.append((module, given, own))
    done.ours[own.__name__] += 1


@functools.cache
def _subclass(mixin: type, own: type) -> type:
    """A subclass of both, which goes by the name of `own`: configs that are saved name a model's class."""
    forward: Any = mixin.forward  # type: ignore[attr-defined]

    @functools.wraps(own.forward)  # type: ignore[attr-defined]
    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:  # Trainer reads a forward's signature
        return forward(self, *args, **kwargs)

    names = {"__module__": own.__module__, "__doc__": own.__doc__, "__qualname__": own.__qualname__, "forward": signed}
    return type(own.__name__, (mixin, own), names)


def _see_head(model: nn.Module, done: Prepared) -> None:
    heads: list[Any] = [module.lm_head for module in model.modules() if isinstance(module, TrainedCausalLM)]
    done.fused_loss = bool(heads) and all(map(head_is_fused, heads))
    if heads and not done.fused_loss:
        done.notes.append("lm_head is trained through an adapter, so logits stand in memory as a whole")


def _attend(model: nn.Module, done: Prepared) -> None:
    """Our attention, in every config that a module of attention reads, unless it lacks something that the model asks for."""
    attentions = [m for m in model.modules() if isinstance(m, _ATTENTIONS)]
    configs: list[Any] = list({id(m.config): m.config for m in attentions}.values())
    reason = _why_not_ours(attentions)
    done.attention = ", ".join(sorted({attention_name(c) or "eager" for c in configs})) or "as the model has it"
    if reason is not None:
        done.notes.append(f"attention is {done.attention}: {reason}")
        return
    for config in configs:
        done._attentions.append((config, attention_name(config)))
        set_attention_name(config, DSO_TRAIN)
    done.attention = DSO_TRAIN


def _why_not_ours(attentions: list[Any]) -> str | None:
    if not attentions:
        return "no module of attention is of a kind known here"
    register_train_attention()
    if any(getattr(m, "attention_dropout", 0.0) for m in attentions):
        return "the model has attention_dropout, which dso_train has not"
    return None


def _checkpoint(model: Any, done: Prepared) -> None:
    if recomputes_layers(model):
        return  # the arguments asked Transformers for it, with options of their own
    if not getattr(model, "supports_gradient_checkpointing", False):
        done.notes.append(f"{type(model).__name__} has no gradient checkpointing: all is kept")
        return
    recompute_layers(model)
    done._checkpointed = True


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    """Parameters with gradients, each once however often it is tied."""
    return [p for p in model.parameters() if p.requires_grad]
