"""Whether a model's modules are still those that a plan was compiled from, so that the plan may replace their forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .lora_layers import without_adapter


class ModuleTree:
    """The modules of a model at the time of construction, by path and type.

    Args:
        model: the model whose forward a plan replaces.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shape = [
            (path, name, type(child))
            for path, module in model.named_modules()
            for name, child in module._modules.items()
            if child is not None
        ]
        self._tree: list[tuple[dict[str, Any], str, nn.Module, str]] | None = None

    def forget(self) -> None:
        """Call after modules were replaced by others of the same types."""
        self._tree = None

    def of_copy(self) -> ModuleTree:
        """The tree of a copy of the model, not all of whose modules need to exist yet."""
        twin = object.__new__(ModuleTree)
        twin._shape, twin._tree = self._shape, None
        return twin

    def changed(self, model: nn.Module) -> str | None:
        """Why the plan cannot serve this module tree (an adapter, a hook); None if it can."""
        layers = self.lora_layers(model)
        if isinstance(layers, str):
            return layers
        return _replaced(next(iter(layers))) if layers else None

    def unserved(self, model: nn.Module) -> str | None:
        """Why a plan that computes no gradients cannot serve this module as it is now (an adapter, a hook, training); None if
        it can."""
        if (reason := self.changed(model)) is not None:
            return reason
        if model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            return "gradients are needed"
        return None

    def lora_layers(self, model: nn.Module) -> dict[str, nn.Module] | str:
        """PEFT's LoRA layers in the module tree, by path of the module that they are around; or why no plan can serve the tree,
        even one that adds what they add."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "global module hooks are registered"
        tree = self._watched(model)
        if not isinstance(tree, str) and any(children.get(name) is not child for children, name, child, _ in tree):
            self._tree = None
            tree = self._watched(model)
        if isinstance(tree, str):
            return tree
        layers: dict[str, nn.Module] = {}
        for _, name, child, path in tree:
            inner = without_adapter(child)
            for module in (child,) if inner is child else (child, inner):
                if module._forward_pre_hooks or any(map(_acts, module._forward_hooks.values())):
                    return f"module {name!r} has forward hooks"
                if not getattr(module.__dict__.get("forward"), "runs_plan", "forward" not in module.__dict__):
                    return f"the forward of module {name!r} was replaced"
            if inner is not child:
                layers[path] = child
        return layers

    def _watched(self, model: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module, str]] | str:
        """(children of a module, name, child, path of the child) for the whole module tree, or how it differs from the plan's
        tree. A child may be a LoRA layer around the plan's."""
        if self._tree is None:
            modules = dict(model.named_modules())
            tree = []
            for path, name, kind in self._shape:
                children: dict[str, Any] = modules[path]._modules if path in modules else {}
                child = children.get(name)
                if child is None or type(without_adapter(child)) is not kind:
                    return _replaced(name)
                tree.append((children, name, child, f"{path}.{name}" if path else name))
            self._tree = tree
        return self._tree


def _replaced(name: str) -> str:
    return f"module {name!r} was replaced or wrapped (an adapter?)"


def _acts(hook: Any) -> bool:
    """Whether a forward hook may have an effect in a call that the plan could serve. Two kinds of permanent hooks have none:
    those that record attention weights on request, and a trainer's hooks that make embeddings require gradients."""
    if getattr(hook, "__name__", "") in ("make_inputs_require_grad", "make_inputs_require_grads"):
        return torch.is_grad_enabled()
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
