"""Whether a model's modules are still those that a plan was compiled from, so that the plan may replace their forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module


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
        self._tree: list[tuple[dict[str, Any], str, nn.Module]] | None = None

    def forget(self) -> None:
        """Call after modules were replaced by others of the same types."""
        self._tree = None

    def of_copy(self) -> ModuleTree:
        """The tree of a copy of the model, not all of whose modules need to exist yet."""
        twin = object.__new__(ModuleTree)
        twin._shape, twin._tree = self._shape, None
        return twin

    def changed(self, model: nn.Module) -> str | None:
        """Why a plan cannot serve this module tree (an adapter, a hook); None if it can."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "global module hooks are registered"
        tree = self._watched(model)
        if isinstance(tree, str):
            return tree
        for children, name, child in tree:
            if children.get(name) is not child:
                return f"module {name!r} was replaced or wrapped (an adapter?)"
            if child._forward_pre_hooks or any(map(_acts, child._forward_hooks.values())):
                return f"module {name!r} has forward hooks"
            if "forward" in child.__dict__:
                return f"the forward of module {name!r} was replaced"
        return None

    def _watched(self, model: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]] | str:
        """(children of a module, name, child) for the whole module tree, or how it differs from the plan's tree."""
        if self._tree is None:
            modules = dict(model.named_modules())
            tree = []
            for path, name, kind in self._shape:
                children = modules[path]._modules if path in modules else {}
                if type(children.get(name)) is not kind:
                    return f"module {name!r} was replaced or wrapped (an adapter?)"
                tree.append((children, name, children[name]))
            self._tree = tree
        return self._tree


def _acts(hook: Any) -> bool:
    """Whether a forward hook may have an effect in a call that the plan could serve. Two kinds of permanent hooks have none:
    those that record attention weights on request, and a trainer's hooks that make embeddings require gradients."""
    if getattr(hook, "__name__", "") in ("make_inputs_require_grad", "make_inputs_require_grads"):
        return torch.is_grad_enabled()
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
