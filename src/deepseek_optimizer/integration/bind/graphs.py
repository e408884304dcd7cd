"""The graphs of a model: its own, and those of the MTP layers that hang on it.

A family names weights as its `ForCausalLM` class does: the decoder under `model`, a head beside it. Other classes have the
decoder elsewhere (an `AutoModel` is the decoder) and no language model head; `model_graph` renames and cuts a graph to fit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...graph import rules
from ...graph.attention_mode import FLASH, AttentionMode, apply_mode
from ...graph.ir import Graph
from ...models import build_graph, build_mtp_graph

# What an MTP layer has of its own only where a checkpoint stores it otherwise than the model's.
SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def plan_graph(
    config: Any, rule_names: tuple[str, ...] | None, mtp_layers: int = 0, mode: AttentionMode = FLASH
) -> tuple[Graph, list[rules.RuleReport]]:
    """The graph of a Transformers config with the named rules applied, and then a mode of attention; its cache has room for so
    many MTP layers."""
    with torch.device("cpu"):  # from_pretrained asks inside a context that makes every tensor a meta tensor
        graph, reports = rules.apply(build_graph(config, mtp_layers), rule_names)
    return apply_mode(graph, mode)[0], reports


def with_eps_of(model: Any, graph: Graph) -> Graph:
    """A graph whose norms add what the model's own do, which may have been set on a module and not in the config."""

    def eps(weight: str, by_config: float) -> float:
        norm = model.get_submodule(weight.rpartition(".")[0])
        return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", by_config)))

    nodes = [
        n.with_(attrs={**n.attrs, "eps": eps(n.weights[0], n.attrs["eps"])}) if "eps" in n.attrs else n for n in graph.nodes
    ]
    return replace(graph, nodes=nodes)


def decoder_path(model: Any) -> str:
    """Path of a Transformers model's decoder, the module that makes hidden states of tokens; "" if that is the model itself."""
    base = getattr(model, "base_model", model)
    return "" if base is model else str(model.base_model_prefix)


def has_head(model: Any) -> bool:
    """Whether a Transformers model computes logits over the vocabulary, and so whether its plan does."""
    return isinstance(getattr(model, "lm_head", None), nn.Module)


def planned_module(model: Any) -> Any:
    """The module whose forward a plan replaces: the model itself if it has a language model head, otherwise its decoder."""
    path = decoder_path(model)
    return model if has_head(model) or not path else model.get_submodule(path)


def model_graph(model: Any, rule_names: tuple[str, ...] | None, mtp_layers: int = 0) -> tuple[Graph, list[rules.RuleReport]]:
    """The graph of a model with the named rules applied, with its own names of weights, and no head where it has none."""
    path = decoder_path(model)

    def named(weight: str) -> str:
        inner = weight.removeprefix("model.")
        return weight if inner == weight else f"{path}.{inner}" if path else inner

    with torch.device("cpu"):  # as in `plan_graph`
        graph = build_graph(model.config, mtp_layers).renamed(named)
        return rules.apply(graph if has_head(model) else graph.without_head(), rule_names)


def loaded_mtp_layers(model: Any) -> int:
    """How many MTP layers hang on a model, behind its own."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    return max(0, len(layers) - int(getattr(model.config, "num_hidden_layers", len(layers))))


def mtp_graphs(model: Any) -> list[Graph]:
    """Unfused, by depth; weights that a layer shares with the model are named as the model's."""
    graphs = []
    count = loaded_mtp_layers(model)
    for depth in range(count):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}"
        tied = dict(model.all_tied_weights_keys or {})
        shared = {
            f"{prefix}.{leaf}": tied.get(name, name) for leaf, name in SHARED.items() if not _has(model, f"{prefix}.{leaf}")
        }
        with torch.device("cpu"):
            graph = build_mtp_graph(model.config, depth, count)
        nodes = [n.with_(weights=tuple(shared.get(w, w) for w in n.weights)) for n in graph.nodes]
        graphs.append(with_eps_of(model, replace(graph, nodes=nodes)))
    return graphs


def whole_graph(model: Any) -> Graph:
    """All nodes of all graphs in one: for facts about weights, not to be run."""
    graph, _ = model_graph(model, (), loaded_mtp_layers(model))
    return replace(graph, nodes=[node for g in (graph, *mtp_graphs(model)) for node in g.nodes])


def _has(model: Any, parameter: str) -> bool:
    try:
        model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return False
    return True
