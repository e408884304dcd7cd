"""Engines for optimised models: what a model brings along is put together here."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

from .engine.async_engine import AsyncEngine
from .engine.core import EngineCore, ModelFacts
from .engine.engine import Engine
from .engine.options import EngineOptions
from .engine.runner import Runner
from .engine.sampling.sampler import largest
from .engine.speculative.base import Proposer
from .engine.speculative.draft_model import DraftModelProposer
from .engine.speculative.mtp import MtpProposer
from .engine.speculative.prompt_lookup import PromptLookupProposer
from .errors import ConfigError, UnsupportedRequestError
from .graph.analysis import dynamic_rope
from .graph.ir import LatentSpec
from .graph.rotation import key_rotation
from .integration.bind.runtime import Runtime, runtime_of
from .integration.generation.special_tokens import token_ids
from .integration.memory.arena import Arena
from .integration.memory.cache_size import FullBatch

_LATENT_CHUNK = 64  # tokens: the form that latent attention takes depends on where a prompt is cut
_LOOKUP, _MTP, _DRAFT_MODEL = 8, 3, 4  # drafts of a round at most
STALL = 2.5  # what a server's streams may notice of others' prompts


def make_engine(model: Any, tokenizer: Any = None, **options: Any) -> Engine:
    """An engine that answers many prompts at once: `make_engine(model, tokenizer).generate(["...", "..."])`.

    Args:
        model: of `load_model`, `from_pretrained` with our config, or `DynamicGraphOptimizer.optimize()`.
        tokenizer: for prompts and answers that are text.
        options: of `EngineOptions`, where the model's config does not say; `drafts=False`: no speculative decoding;
            `draft_model`: a small optimised model of the same tokenizer that drafts for this one; `arena`: cache memory to
            use in place of the model's own, of `model.dso.new_arena(bytes)`. The model's own may grow to `kv_cache_memory`;
            where the config doesn't say, to what a full batch at the model's context needs, at most half of what is free.

    Raises:
        ConfigError: not an optimised model, an unknown option, or one that this model cannot do.
        NotEnoughMemoryError: `kv_cache_memory` is more than is free.
    """
    core, running = _core(model, tokenizer, options)
    return Engine(core, running)


def make_async_engine(model: Any, tokenizer: Any, *, model_name: str | None = None, **options: Any) -> AsyncEngine:
    """The same for an event loop, such as the server's. Prompts are run in pieces that stall the other streams by STALL at
    most.

    Args:
        model_name: what clients call it; None: the last part of the path that it was loaded from.
    """
    core, running = _core(model, tokenizer, {"stall": STALL, **options})
    return AsyncEngine(core, model_name or _name(model), running, runtime_of(model).replaced_files)


def _name(model: Any) -> str:
    path = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(path))


def _core(model: Any, tokenizer: Any, given: dict[str, Any]) -> tuple[EngineCore, Callable[[], AbstractContextManager[None]]]:
    runtime = _with_head(model)
    config = runtime.config
    drafts = given.pop("drafts", True)
    draft_model = given.pop("draft_model", None)
    arena = given.pop("arena", None)
    unknown = set(given) - {f.name for f in fields(EngineOptions)}
    if unknown:
        raise ConfigError(
            f"an engine has no option {sorted(unknown)[0]!r}; it has {', '.join(f.name for f in fields(EngineOptions))}"
        )
    options = EngineOptions(
        batch_size_range=config.batch_size_range, step_tokens=config.prefill_chunk, batch_invariant=config.batch_invariant
    )
    options = replace(options, **given)
    if (reason := runtime.changed()) is not None:
        raise UnsupportedRequestError(f"{reason}: an engine runs the plan alone; take it away first")
    backend = runtime.backend
    if options.batch_invariant and not backend.capabilities.batch_invariant:
        raise ConfigError(
            f'batch_invariant=True: the {backend.name} backend\'s products depend on the batch; use backend="cpu", or leave '
            "batch_invariant out"
        )
    if options.cache_window is not None:
        if options.batch_invariant:
            raise ConfigError("batch_invariant=True and cache_window: when the window slides depends on the batch; choose one")
        key_rotation(runtime.graph)  # an error where keys cannot be moved
    batch = _full_batch(runtime, options)
    other = _with_head(draft_model) if drafts and draft_model is not None else None
    arena = arena or runtime.serving_arena(batch, 0 if other is None else _full_batch(other, options).bytes)
    vocab = runtime.graph.vocab_size
    rope = dynamic_rope(runtime.graph)
    latent = isinstance(runtime.graph.cache, LatentSpec)
    facts = ModelFacts(
        vocab_size=vocab,
        hidden_size=runtime.graph.hidden_size,
        context=runtime.graph.max_positions,
        eos=_ends(model, vocab),
        chunk=_LATENT_CHUNK if latent and not options.batch_invariant else None,
        plain=None if rope is None else rope.context,
    )
    runner = Runner(runtime.plan, arena, vocab)
    draft = None if other is None else _draft_model(runtime, other, options)
    proposers = _proposers(runtime, arena, draft) if drafts else None
    core = EngineCore(runner, arena, facts, options, tokenizer, proposers, keep=(model, draft_model))
    return core, backend.thread_context


def _full_batch(runtime: Runtime, options: EngineOptions) -> FullBatch:
    """The cache that all sequences of an engine take at most."""
    context = runtime.graph.max_positions
    tokens = context if options.cache_window is None else min(context, options.cache_window)
    return runtime.full_batch(options.batch_size_range[1], tokens, options.step_tokens)


def _with_head(model: Any) -> Runtime:
    runtime = runtime_of(model)
    if not runtime.graph.has_head:
        raise ConfigError(f"{type(model).__name__} has no head to generate with; load the checkpoint with load_model")
    return runtime


def _proposers(runtime: Runtime, arena: Arena, draft: Proposer | None) -> list[tuple[Proposer, int]]:
    found: list[tuple[Proposer, int]] = [(PromptLookupProposer(), _LOOKUP)]
    if draft is not None:
        found.append((draft, _DRAFT_MODEL))
    if plans := runtime.mtp_plans:
        layers = [Runner(plan, arena) for plan in plans]
        found.append((MtpProposer(layers, lambda _, __, logits: (int(largest(logits[None])), None)), max(_MTP, len(plans))))
    return found


def _draft_model(runtime: Runtime, other: Runtime, options: EngineOptions) -> DraftModelProposer:
    """Its cache is the draft model's own, with a share of the half that the model's has."""
    mine, theirs = runtime.graph.vocab_size, other.graph.vocab_size
    if mine != theirs:
        raise ConfigError(
            f"draft_model has a vocabulary of {theirs} tokens, the model one of {mine}: they must share a tokenizer"
        )
    arena = other.serving_arena(_full_batch(other, options), _full_batch(runtime, options).bytes)
    return DraftModelProposer(Runner(other.plan, arena, mine), other.graph.max_positions, other.config.prefill_chunk)


def _ends(model: Any, vocab: int) -> frozenset[int]:
    """Tokens that end a text, by the model's generation config; ids that are no tokens (-1 for "none") end none."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    return frozenset(token for token in token_ids("generation_config.eos_token_id", ids) if 0 <= token < vocab)
