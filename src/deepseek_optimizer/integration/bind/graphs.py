"""The graphs of a model: the main one, and those of its MTP layers.

Graphs name weights as the family's `ForCausalLM` class does: the decoder under `model`, the head outside it. In other classes
the decoder has another path (an `AutoModel` is the decoder) and there is no language model head; `model_graph` renames the
weights and removes the head accordingly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...config import DeepSeekConfig
from ...engine.draft import DraftVocabulary
from ...errors import CheckpointError
from ...graph import rules
from ...graph.attention_mode import FLASH, AttentionMode, apply_mode
from ...graph.cache_groups import cached_in
from ...graph.ir import Graph
from ...models import build_graph, build_mtp_graph

# Weights that an MTP layer shares with the model, unless the checkpoint stores other values for it.
HEAD = "shared_head.head.weight"
SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", HEAD: "lm_head.weight"}
# int64 [N], ascending: the token of each row of a head with a draft vocabulary (`models.draft_vocab_size`).
DRAFT_TOKENS = "shared_head.tokens"


def plan_graph(
    config: Any, rule_names: tuple[str, ...] | None, mtp_layers: int = 0, mode: AttentionMode = FLASH
) -> tuple[Graph, list[rules.RuleReport]]:
    """The graph of a Transformers config, with fusion rules and then an attention mode applied.

    Args:
        config: the Transformers config.
        rule_names: the rules to apply; None: all.
        mtp_layers: number of MTP layers that the cache has room for.
        mode: the attention mode.

    Returns: the graph, and what each rule changed.
    """
    with torch.device("cpu"):  # from_pretrained calls this inside a context that makes every tensor a meta tensor
        graph, reports = rules.apply(build_graph(config, mtp_layers), rule_names)
    return apply_mode(graph, mode)[0], reports


def with_eps_of(model: Any, graph: Graph) -> Graph:
    """The graph with the epsilons of the model's norm modules, which may differ from the config's. Norms without a weight keep
    the config's."""

    def eps(weight: str, by_config: float) -> float:
        norm = model.get_submodule(weight.rpartition(".")[0])
        return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", by_config)))

    nodes = [
        n.with_(attrs={**n.attrs, "eps": eps(n.weights[0], n.attrs["eps"])}) if "eps" in n.attrs and n.weights else n
        for n in graph.nodes
    ]
    return replace(graph, nodes=nodes)


def decoder_name(model: Any) -> str:
    """The name that a Transformers model's decoder has in classes with a head: `base_model_prefix`, except in Llama 4's class,
    which has no such module."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return prefix if not has_head(model) or hasattr(model, prefix) else "model"


def decoder_path(model: Any) -> str:
    """Path of a Transformers model's decoder, which computes hidden states from tokens; "" if that is the model itself."""
    name = decoder_name(model)
    return "" if not name or getattr(model, name, model) is model else name


def has_head(model: Any) -> bool:
    """Whether a Transformers model computes logits over the vocabulary, and so whether its plan does."""
    return isinstance(getattr(model, "lm_head", None), nn.Module)


def planned_module(model: Any) -> Any:
    """The module whose forward a plan replaces: the model itself if it has a language model head, otherwise its decoder."""
    path = decoder_path(model)
    return model if has_head(model) or not path else model.get_submodule(path)


def model_graph(model: Any, rule_names: tuple[str, ...] | None, mtp_layers: int = 0) -> tuple[Graph, list[rules.RuleReport]]:
    """The graph of a model with the named rules applied, its own weight names, and a head only if the model has one.

    Args and returns as in `plan_graph`.
    """
    path = decoder_path(model)

    def named(weight: str) -> str:
        inner = weight.removeprefix("model.")
        return weight if inner == weight else f"{path}.{inner}" if path else inner

    with torch.device("cpu"):  # as in `plan_graph`
        graph = build_graph(model.config, mtp_layers).renamed(named)
        return rules.apply(graph if has_head(model) else graph.without_head(), rule_names)


def planned_graph(model: Any, config: DeepSeekConfig) -> tuple[Graph, list[rules.RuleReport], list[str]]:
    """The graph that a model's plan is compiled from.

    Args:
        model: as in `Runtime`; its weights need not be loaded.
        config: the settings.

    Returns: the graph; what each rule changed; the layers whose attention the attention mode changed.
    """
    graph, reports = model_graph(model, config.rules, loaded_mtp_layers(model))
    graph, in_mode = apply_mode(with_eps_of(model, graph), config.attention)
    return cached_in(graph, config.kv_cache), reports, in_mode


def planned_mtp_graphs(model: Any, config: DeepSeekConfig, main: Graph) -> list[Graph]:
    """The graphs of the plans of the loaded MTP layers, by depth, with the cache of the model's graph `main`."""
    graphs = [apply_mode(rules.apply(graph, config.rules)[0], config.attention)[0] for graph in mtp_graphs(model)]
    return [replace(graph, cache=main.cache) for graph in graphs]  # with the model's groups of layers


def loaded_mtp_layers(model: Any) -> int:
    """The number of MTP layers that a model has after its decoder layers."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    return max(0, len(layers) - int(getattr(model.config, "num_hidden_layers", len(layers))))


def mtp_graphs(model: Any) -> list[Graph]:
    """The graphs of the MTP layers by depth, without fusion; shared weights have the model's names."""
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


def draft_vocabularies(model: Any) -> list[DraftVocabulary | None]:
    """The draft vocabulary of each loaded MTP layer by depth; None: the layer's head has a row for every token.

    Raises:
        CheckpointError: its tokens are not valid.
    """
    found: list[DraftVocabulary | None] = []
    first = model.config.num_hidden_layers
    for layer in range(first, first + loaded_mtp_layers(model)):
        tokens = getattr(model.model.layers[layer].shared_head, "tokens", None)
        try:
            found.append(None if tokens is None else DraftVocabulary(tokens.cpu().numpy(), model.config.vocab_size))
        except ValueError as error:
            source = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
            raise CheckpointError(str(error), file=source, tensor=f"model.layers.{layer}.{DRAFT_TOKENS}") from error
    return found


def whole_graph(model: Any) -> Graph:
    """The nodes of all graphs in one, to look up facts about weights; it cannot be run."""
    graph, _ = model_graph(model, (), loaded_mtp_layers(model))
    return replace(graph, nodes=[node for g in (graph, *mtp_graphs(model)) for node in g.nodes])


def _has(model: Any, parameter: str) -> bool:
    try:
        model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return False
    return True
