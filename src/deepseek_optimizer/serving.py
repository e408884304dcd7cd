"""Creates engines for optimized models from the model's plan, cache and drafting layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .backends.base import BLOCK_TOKENS, Plan
from .backends.qualities import EXACT, QUALITIES, Quality
from .checkpoint.prefix_files import PrefixFiles
from .engine.adapters import Adapters, AdapterWeights
from .engine.async_engine import AsyncEngine
from .engine.core import EngineCore
from .engine.encoder_core import EncoderCore
from .engine.engine import Engine
from .engine.model_facts import ModelFacts
from .engine.options import EngineOptions
from .engine.runner import Runner
from .engine.sampling.torch_sampler import TorchSampler
from .engine.speculative.base import Proposer
from .engine.speculative.mtp import MtpProposer
from .engine.speculative.prompt_lookup import PromptLookupProposer
from .errors import ConfigError, NotEnoughMemoryError, UnsupportedRequestError
from .graph.analysis import dynamic_rope
from .graph.ir import LatentSpec
from .graph.rope_rotation import key_rotation
from .integration.bind.packed_model import packed_model_of
from .integration.bind.runtime import Runtime, runtime_of
from .integration.encoder.text_encoder import TextEncoder, classifier_of, is_encoder_runtime, max_tokens
from .integration.generation.fingerprint import fingerprint
from .integration.generation.special_tokens import token_ids
from .integration.generation.speculation import draft_model_proposer, mtp_proposer
from .integration.load.lora import read_adapter
from .integration.memory.arena import Arena
from .integration.memory.cache_size import FullBatch
from .integration.multimodal import PictureEncoder, embeddings_of, is_multimodal
from .system.memory import less_reserve
from .versions import versions

_LATENT_CHUNK = 64  # tokens; the form of latent attention (absorbed or expanded) depends on how a prompt is split into chunks
_MAX_LORAS, _MAX_RANK = 1024, 1024
_LOOKUP, _MTP, _DRAFT_MODEL = 8, 3, 4  # maximum number of drafts per round
# Options without effect for encoders
_NOT_OF_ENCODERS = frozenset({"drafts", "draft_model", "arena", "adapters", "max_loras", "max_lora_rank", "lora_dtype"})
STALL = 2.5  # the default of `EngineOptions.stall` for servers


def make_engine(model: Any, tokenizer: Any = None, **options: Any) -> Engine:
    """Creates an engine that processes many prompts in one batch: `make_engine(model, tokenizer).generate(["...", "..."])`.

    Args:
        model: an optimized model, from `load_model`, `from_pretrained` with a `DeepSeekConfig`, or
            `DynamicGraphOptimizer.optimize()`.
        tokenizer: for prompts and answers as text; None: token ids only.
        options: fields of `EngineOptions`, which override the model's config; `drafts=False`: no speculative decoding, a
            number: at most so many drafts a round (default: that of the model's profile, see `load_model`);
            `draft_model`: a small optimized model with the same tokenizer, which drafts tokens for this one; `arena`: cache
            memory from `model.dso.new_arena(bytes)`, to use instead of the model's own; `adapters`: LoRA adapters to load, a
            mapping of names to directories (`max_loras` is then at least their number). The model's own cache may grow to
            `kv_cache_memory` or, if that is not set, to the size that a full batch at the model's context length needs, but to
            at most half of the free memory.

    Raises:
        ConfigError: the model is not optimized, an option is unknown, or the model does not support it.
        NotEnoughMemoryError: `kv_cache_memory` exceeds free memory.
        RequestError, AdapterError, CheckpointError: an adapter cannot be loaded, see `Adapters.load`.
    """
    core, running = _core(model, tokenizer, options)
    return Engine(core, running)


def make_async_engine(
    model: Any, tokenizer: Any, *, model_name: str | None = None, pictures: PictureEncoder | None = None, **options: Any
) -> AsyncEngine:
    """Creates an engine for an event loop, such as the server's. An encoder (BERT and the like) embeds and classifies texts; it
    has no cache and no drafts, and ignores options about them.

    Prompts are processed in chunks, such that a step with prompt tokens takes at most about 2.5 times as long as one without
    (option `stall`).

    Args:
        model, tokenizer, options: as for `make_engine`; for an encoder also `max_tokens`, a limit of the tokens of a text.
        model_name: the name that clients use; None: the last component of the path that the model was loaded from.
        pictures: makes prompts with pictures for a multimodal model; None: requests have text only.

    Raises:
        ConfigError, NotEnoughMemoryError: as for `make_engine`.
    """
    name, runtime = model_name or _name(model), packed_model_of(model)
    if is_encoder_runtime(runtime):
        core_of_encoder = _encoder_core(model, tokenizer, options)
        return AsyncEngine(core_of_encoder, name, replaced_files=runtime.replaced_files, weights=runtime)
    core, running = _core(model, tokenizer, {"stall": STALL, **options}, name)
    return AsyncEngine(core, name, running, runtime.replaced_files, runtime, pictures)


def _name(model: Any) -> str:
    path = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(path))


def _encoder_core(model: Any, tokenizer: Any, given: dict[str, Any]) -> EncoderCore:
    limit = given.pop("max_tokens", None)
    unknown = set(given) - {f.name for f in fields(EngineOptions)} - _NOT_OF_ENCODERS
    if unknown:
        raise ConfigError(f"an engine has no option {sorted(unknown)[0]!r}")
    if given.get("adapters"):
        raise ConfigError("adapters (--lora): encoders have none; leave them out")
    config = model.dso.config
    options = EngineOptions(batch_size_range=config.batch_size_range, step_tokens=config.prefill_chunk)
    if "max_waiting" in given:
        options = replace(options, max_waiting=given["max_waiting"])
    context = max_tokens(model, tokenizer)
    facts = ModelFacts(
        vocab_size=model.config.vocab_size,
        hidden_size=getattr(model.config, "hidden_size", 0),
        context=context if limit is None else min(context, limit),
        eos=frozenset(),
    )
    return EncoderCore(TextEncoder(model), facts, options, tokenizer, classifier_of(model), keep=model)


def _core(
    model: Any, tokenizer: Any, given: dict[str, Any], name: str = ""
) -> tuple[EngineCore, Callable[[], AbstractContextManager[None]]]:
    runtime = _with_head(model)
    config = runtime.config
    profile = runtime.profile
    drafts = given.pop("drafts", True if profile is None or profile.drafts is None else profile.drafts)
    if not isinstance(drafts, int) or drafts < 0:
        raise ConfigError(f"drafts must be True, False, or a number of at least 0, got {drafts!r}")
    if profile is not None and profile.quality is not None and runtime.has_qualities:
        given.setdefault("quality", profile.quality)
    draft_model = given.pop("draft_model", None)
    arena = given.pop("arena", None)
    first_adapters: Mapping[str, str] = given.pop("adapters", None) or {}
    unknown = set(given) - {f.name for f in fields(EngineOptions)}
    if unknown:
        known = ", ".join(f.name for f in fields(EngineOptions))
        raise ConfigError(f"an engine has no option {sorted(unknown)[0]!r}; the options are {known}")
    options = EngineOptions(
        batch_size_range=config.batch_size_range, step_tokens=config.prefill_chunk, batch_invariant=config.batch_invariant
    )
    options = replace(options, **given)
    options = replace(options, max_loras=max(options.max_loras, len(first_adapters)))
    if (reason := runtime.changed()) is not None:
        raise UnsupportedRequestError(f"{reason}: an engine runs only the compiled plan; remove the change first")
    backend = runtime.backend
    if options.quality not in QUALITIES:
        raise ConfigError(f"quality must be one of {', '.join(QUALITIES)}, got {options.quality!r}")
    if options.quality != EXACT and not runtime.has_qualities:
        raise ConfigError(f'quality={options.quality!r}: this model has one quality; load it with precision="int8_nested"')
    if options.batch_invariant and not backend.capabilities.batch_invariant:
        raise ConfigError(
            f'batch_invariant=True: results of the {backend.name} backend depend on the batch; use backend="cpu", or omit '
            "batch_invariant"
        )
    if options.cache_window is not None:
        if options.batch_invariant:
            raise ConfigError("batch_invariant=True and cache_window: the window slides depending on the batch; choose one")
        key_rotation(runtime.graph)  # raises an error if this model's keys cannot be moved to other positions
    adapted = _plan_with_adapters(runtime, options, name) if options.max_loras else None
    adapters = None if adapted is None else adapted[1]
    for adapter, path in first_adapters.items():  # before the cache, whose size depends on the memory that is left
        assert adapters is not None
        adapters.load(adapter, path)
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
        pictures=is_multimodal(model),
        qualities=runtime.has_qualities,
    )
    adapted_plan = None if adapted is None else (adapted[0], adapted[1].store)
    embed = embeddings_of(model) if facts.pictures else None
    lower = _lower_plans(runtime, options) if facts.qualities else None
    runner = Runner(runtime.plan, arena, vocab, adapted_plan, backend.capabilities.decode_calls, embed, lower)
    draft = None if other is None else _draft_model(runtime, other, options)
    proposers = _proposers(runtime, arena, draft, None if drafts is True else drafts) if drafts else None
    store = _prefix_files(runtime, arena, options, proposers)
    keep = (model, draft_model)
    core = EngineCore(runner, arena, facts, options, tokenizer, proposers, keep=keep, adapters=adapters, store=store)
    return core, backend.thread_context


def _plan_with_adapters(runtime: Runtime, options: EngineOptions, name: str) -> tuple[Plan, Adapters]:
    """Returns a plan for steps with adapters, and the adapters, of which none is loaded yet."""
    backend = runtime.backend
    if not backend.capabilities.adapters:
        raise ConfigError(f'max_loras: the {backend.name} backend does not support adapters; use backend="cpu"')
    if options.max_lora_rank < 1 or options.max_lora_rank > _MAX_RANK:
        raise ConfigError(f"max_lora_rank must be from 1 to {_MAX_RANK}, got {options.max_lora_rank}")
    if options.max_loras > _MAX_LORAS:
        raise ConfigError(f"max_loras must be at most {_MAX_LORAS}, got {options.max_loras}")
    dtype = options.lora_dtype
    if dtype == "auto":
        dtype = "fp32" if {entry.format for entry in runtime.manifest.modules.values()} == {"fp32"} else "bf16"
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"lora_dtype must be auto, fp32 or bf16, got {dtype!r}")
    graph = runtime.adapter_graph(options.max_lora_rank)
    store = backend.new_adapters(graph, options.max_loras, options.max_lora_rank, dtype)

    def read(path: Path, check_size: Callable[[Mapping[int, int]], None]) -> AdapterWeights:
        return read_adapter(path, graph, options.max_lora_rank, check_size)

    def check_memory(size: int) -> None:
        free = backend.free_memory()
        if size > less_reserve(free.free):
            remedy = "unload another adapter, or set a smaller kv_cache_memory (--kv-cache-memory)"
            raise NotEnoughMemoryError("the adapter", size, less_reserve(free.free), remedy, free.tightest)

    return runtime.compile(graph), Adapters(store, read, check_memory, frozenset({name} - {""}))


def _lower_plans(runtime: Runtime, options: EngineOptions) -> dict[Quality, tuple[Plan, Plan | None]]:
    """Returns the plans of lower qualities, without adapters and with them."""
    graph = runtime.adapter_graph(options.max_lora_rank) if options.max_loras else None
    return {
        quality: (runtime.plan_of(quality), None if graph is None else runtime.compile(graph, quality))
        for quality in QUALITIES
        if quality != EXACT
    }


def _prefix_files(
    runtime: Runtime, arena: Arena, options: EngineOptions, proposers: list[tuple[Proposer, int]] | None
) -> PrefixFiles | None:
    """Returns the files of the prefix cache, which are of use only to an engine that would compute the same bits."""
    if options.prefix_cache_dir is None:
        return None
    if not options.prefix_cache:
        raise ConfigError("prefix_cache_dir needs the prefix cache; leave out prefix_cache=False (--no-prefix-cache)")
    facts = fingerprint(runtime, whole=True) | {
        "instruction set": str(runtime.backend.isa),
        "batch invariant": str(options.batch_invariant),
        "MTP layers": str(any(isinstance(proposer, MtpProposer) for proposer, _ in proposers or ())),  # their keys and values
        "adapters": options.lora_dtype,  # which one is part of each key
        "groups": repr(arena.manager.groups),
        "block tokens": str(BLOCK_TOKENS),
        "versions": repr(sorted(versions().items())),
    }
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=16).digest()
    store = arena.store
    return PrefixFiles(options.prefix_cache_dir, digest, options.prefix_cache_bytes, store.saved_bytes, store.state_bytes)


def _full_batch(runtime: Runtime, options: EngineOptions) -> FullBatch:
    """Returns the maximum size of the cache: all sequences of an engine at their maximum length."""
    context = runtime.graph.max_positions
    tokens = context if options.cache_window is None else min(context, options.cache_window)
    return runtime.full_batch(options.batch_size_range[1], tokens, options.step_tokens)


def _with_head(model: Any) -> Runtime:
    runtime = runtime_of(model)
    if not runtime.graph.has_head:
        raise ConfigError(f"{type(model).__name__} has no language model head; load the checkpoint with load_model")
    return runtime


def _proposers(runtime: Runtime, arena: Arena, draft: Proposer | None, most: int | None) -> list[tuple[Proposer, int]]:
    """The proposers of drafts, each with its maximum number of drafts in a round, at most `most`."""
    proposers: list[tuple[Proposer, int]] = [(PromptLookupProposer(), _LOOKUP)]
    if draft is not None:
        proposers.append((draft, _DRAFT_MODEL))
    if plans := runtime.mtp_plans:
        proposers.append((mtp_proposer(runtime, arena, TorchSampler(sampled=False)), max(_MTP, len(plans))))
    return [(proposer, count if most is None else min(count, most)) for proposer, count in proposers]


def _draft_model(runtime: Runtime, other: Runtime, options: EngineOptions) -> Proposer:
    """Returns a proposer with a cache of its own; both models' caches together take at most half of free memory."""
    vocab_size, draft_vocab_size = runtime.graph.vocab_size, other.graph.vocab_size
    if vocab_size != draft_vocab_size:
        raise ConfigError(
            f"draft_model has a vocabulary of {draft_vocab_size} tokens, the model one of {vocab_size}; use one with the same "
            "tokenizer"
        )
    arena = other.serving_arena(_full_batch(other, options), _full_batch(runtime, options).bytes)
    return draft_model_proposer(other, arena)


def _ends(model: Any, vocab: int) -> frozenset[int]:
    """Returns the end-of-text tokens of the model's generation config, without ids outside the vocabulary (-1 means none)."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config, "eos_token_id", None)
    return frozenset(token for token in token_ids("generation_config.eos_token_id", ids) if 0 <= token < vocab)
