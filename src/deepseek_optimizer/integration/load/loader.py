"""Loads a checkpoint into an optimized model, which is created on the meta device and filled tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...backends.base import Backend
from ...backends.parallel import serve, serve_stage
from ...backends.parallel.messages import FAILED, READY, answer
from ...checkpoint import (
    METHODS,
    Checkpoint,
    GgufCheckpoint,
    LoadProgress,
    Manifest,
    PackedCheckpoint,
    check_tokenizer_beside,
    load_tokenizer,
    open_checkpoint,
    stream_weights,
)
from ...checkpoint.load import IGNORED, NO_PARTS, Part
from ...config import BUILT_IN_TEXT, DeepSeekConfig
from ...errors import CheckpointError, ConfigError, DeepSeekOptimizerError
from ...graph.min_formats import exact_weights, fp32_weights
from ...quant import PackedWeight, Packer
from ...system.affinity import OnCpus
from ...system.progress import show_progress
from ..bind.classes import check_causal
from ..bind.context_extension import extended
from ..bind.dtypes import kept_in_fp32, model_dtype
from ..bind.graphs import whole_graph
from ..bind.host_experts import place_experts, stays_on_host
from ..bind.runnable import check_runnable
from ..bind.swap import expected_tensors, order_columns, swap_on_meta
from ..compat import causal_lm_class
from ..configs import check_config
from ..memory.weights import check_memory
from ..model.bind_plan import bind
from .calibrate import calibrate, calibration_for, without_rounding
from .general import load_general, why_general_path, why_language_alone
from .kl_budget import adapt, calibration_tokens
from .member import Member, Share, own_part
from .mtp_layers import add_mtp_layers, own_tensors, same_tensor, stored_mtp_layers
from .placement import packing_backend, parse_device, placed, with_backend
from .quantizer import mark_quantized
from .ranks import bytes_of_parts, check_divisible, narrow, share_of, start_ranks
from .rendezvous import Place
from .resolve import resolve
from .same_model import fingerprint

_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float32,  # which plans do not have
}  # fmt: skip
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load(
    path: str | os.PathLike[str],
    config: DeepSeekConfig | None,
    fields: dict[str, Any],
    language_alone: str = "",
    device: Any = None,
    member: Member | None = None,
) -> Any:
    """Implements `load_model`, which documents the arguments.

    Args:
        path, config: as there.
        fields: override those of `config`.
        language_alone: why of a multimodal checkpoint its language model is to be loaded alone, if it can; "": the settings
            decide.
        device: as there.
        member: the process that loads its part of a model that several processes run; None: the first one, or the only one.
    """
    with open_to_load(path, config, fields, language_alone) as (checkpoint, no_plan):
        if no_plan is not None:
            section = checkpoint.config().get("quantization_config")
            if (divided := _settings(section, checkpoint, config, fields)).parallel.ranks > 1:
                check_divisible(divided, torch.device("cpu"), no_plan, packed=False)
            target = None if device is None else parse_device(device)
            general = load_general(checkpoint, divided, no_plan)
            return general if target is None else general.to(target)
        model, settings, dtype = sketch(checkpoint, config, fields)
        backend_asked_for = settings.backend  # saved with the model, which another machine may load
        settings, target = placed(settings, device)
        check_runnable(model, settings, target)
        backend = packing_backend(settings)
        checkpoint.mapper = backend.map_file if backend.maps_files else None
        manifest = checkpoint.manifest if isinstance(checkpoint, PackedCheckpoint) else None
        if settings.parallel.ranks > 1:
            check_divisible(settings, target, None, packed=manifest is not None)
            return _load_part(model, checkpoint, settings, dtype, backend, member)
        texts = None
        if settings.kl_budget is not None and manifest is None:
            texts = calibration_tokens(settings, load_tokenizer(checkpoint), model.config.max_position_embeddings)
        placement = place_experts(model, settings, target, mapped=manifest is not None)
        placement.mark()
        calibration, notes = calibration_for(
            checkpoint, settings, *expected_tensors(model), model.config.max_position_embeddings
        )
        if target.type != "cpu" and (calibration is not None or texts is not None):
            raise ConfigError(
                f"calibration and kl_budget run the model on the CPU; convert it first with `dso convert`, and load the result "
                f"with device={str(target)!r}"
            )
        if calibration is not None:
            original = load(checkpoint.path, None, without_rounding(settings), language_alone="it is calibrated")
            calibrate(original, settings, calibration)
            return original
        with show_reading(checkpoint) as progress:
            _fill(model, weights_for(model, checkpoint, backend.pack, progress), target)
        checkpoint.check_unchanged()
        name_source(model, checkpoint, dtype)
        notes += checkpoint.remarks()
        notes += checkpoint.conversions() if settings.precision == "auto" else []
        total = sum(info.nbytes for info in checkpoint.tensors.values())
    if target.type != "cpu":
        model.to(target)  # buffers; the weights are there
    mark_quantized(model, with_backend(settings, backend_asked_for))
    bind(model.eval(), settings, earlier=manifest, bytes_before=total, notes=notes)
    model.dso.placed(placement)
    model.dso.mappings.update(checkpoint.mappings())
    if texts is not None:
        adapt(model, texts)
    return model


def _load_part(
    model: Any, checkpoint: Checkpoint, settings: DeepSeekConfig, dtype: torch.dtype, packing: Backend, member: Member | None
) -> Any:
    """Loads this process's part of a model that several processes run.

    Args:
        model: from `sketch`.
        checkpoint, settings, dtype: of the model.
        packing: packs weights.
        member: this process; None: the leader, which starts the others, or one of those on several machines.
    """
    if member is None:
        if settings.parallel.pipeline == 1 and Place.of_environment() is None:
            _check_memory(model, checkpoint, torch.device("cpu"), settings.kv_cache_memory)  # of all processes together
        share_of(model, settings, 0)  # raises errors before processes are started
        member = start_ranks(checkpoint, settings)
    share = share_of(model, settings, member.rank, member.machines)
    with OnCpus(member.cpus):
        return _load_share(model, checkpoint, settings, dtype, packing, member, share)


def _load_share(
    model: Any,
    checkpoint: Checkpoint,
    settings: DeepSeekConfig,
    dtype: torch.dtype,
    packing: Backend,
    member: Member,
    share: Share,
) -> Any:
    """Loads what a process has of a model, and runs it in all processes but the first one."""
    try:
        if share.names is not None:
            _check_memory(model, checkpoint, torch.device("cpu"), settings.kv_cache_memory, share.names)
        elif member.group is not None and not member.one_host and not isinstance(checkpoint, PackedCheckpoint):
            check_memory(bytes_of_parts(model, share.parts, member.group.ranks))
        with show_reading(checkpoint) if member.leader is not None else nullcontext() as progress:
            own = weights_for(model, checkpoint, packing.pack, progress, share.names, parts=share.parts)
            _fill(model, own, torch.device("cpu"))
        checkpoint.check_unchanged()
        narrow(model, share.parts)
        name_source(model, checkpoint, dtype)
        mark_quantized(model, settings)
        notes = checkpoint.remarks()
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        earlier = checkpoint.manifest if isinstance(checkpoint, PackedCheckpoint) else None
        bind(model.eval(), settings, earlier=earlier, bytes_before=total, notes=notes, backend=member.backend(settings, share))
        model.dso.mappings.update(checkpoint.mappings())
        _ = model.dso.plan
        if member.rank == 0 or not share.stages:  # rank 0 of a pipeline has the MTP layers
            _ = model.dso.mtp_plans  # otherwise, all processes compile the same plans in the same order
        own_files = bool(share.stages) or not member.one_host
        same = fingerprint(share.stages, model.dso.graph, settings, checkpoint) if own_files else ""
        if member.leader is not None:
            member.leader.started(same)
    except BaseException as error:
        if member.leader is not None:
            member.leader.close()
        if not member.one_host and member.link is not None:
            answer(member.link, FAILED, f"{type(error).__name__}: {error}")  # what the leader raises
        raise
    if member.link is not None:
        answer(member.link, READY, same)
        run = serve_stage if share.stages else serve
        ended = run(model.dso.backend, own_part(model.dso), member.link)
        # This process was started for its part only. On one machine, nobody is left who would read its status.
        if not member.one_host:
            raise SystemExit(0 if ended else 1)
    return model


@contextmanager
def open_to_load(
    path: str | os.PathLike[str], config: DeepSeekConfig | None, fields: dict[str, Any], language_alone: str = ""
) -> Iterator[tuple[Checkpoint, str | None]]:
    """Opens a checkpoint, of a multimodal one what `load_model` loads: the whole or the language model.

    Args:
        path, config, fields, language_alone: as in `load`.

    Yields:
        The checkpoint, and why the model has no execution plan; None: it has one.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as in `load_model`.
    """
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(resolve(path)))
        alone: str | None = ""
        if checkpoint.whole is not None:
            settings = _settings(checkpoint.config().get("quantization_config"), checkpoint, config, fields)
            alone = language_alone or why_language_alone(checkpoint, settings)
            if alone is None:
                checkpoint = opened.enter_context(open_checkpoint(checkpoint.path, whole=True))
            elif alone:
                checkpoint.left_out.append(f"this model does not read pictures: {alone}")
        if alone is not None and (checkpoint.path / "modules.json").is_file():
            checkpoint.name_as_causal()
        yield checkpoint, why_general_path(checkpoint, config, fields)


def _check_memory(
    model: Any, checkpoint: Checkpoint, device: torch.device, cache: int | None, names: Iterable[str] | None = None
) -> None:
    """See `check_memory`; `names`: of the tensors, None: all. Those of a packed checkpoint are mapped instead."""
    if isinstance(checkpoint, PackedCheckpoint) and device.type == "cpu":
        return
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    check_memory((tensors[name] for name in (expected_tensors(model)[0] if names is None else names)), device, cache)


def sketch(
    checkpoint: Checkpoint, config: DeepSeekConfig | None, fields: dict[str, Any]
) -> tuple[Any, DeepSeekConfig, torch.dtype]:
    """Checks a checkpoint and creates its model without weights, on the meta device. Only file headers are read.

    Args:
        checkpoint: the checkpoint.
        config, fields: as in `load_model`.

    Returns: the model with empty packed modules, its settings, and the dtype that it is loaded in.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as in `load_model`.
    """
    raw = checkpoint.config()
    check_config(raw)
    check_tokenizer_beside(checkpoint)
    settings = _settings(raw.pop("quantization_config", None), checkpoint, config, fields)
    model = _empty_model(raw, settings, checkpoint.path)
    dtype = torch.float32 if settings.precision == "fp32" else _float_dtype(checkpoint, model.config)
    if settings.mtp == "auto":
        add_mtp_layers(model, own_tensors(checkpoint, model.config))
    packed = checkpoint.manifest.formats() if isinstance(checkpoint, PackedCheckpoint) else None
    swap_on_meta(model, whole_graph(model), settings, dtype, checkpoint.own_format, packed)
    order_columns(model, checkpoint.column_order)
    check_causal(checkpoint, model)
    return model, settings, dtype


def _settings(section: Any, checkpoint: Checkpoint, config: DeepSeekConfig | None, fields: dict[str, Any]) -> DeepSeekConfig:
    """The settings of a load: those that the checkpoint was packed with, overridden by `config`, then by `fields`."""
    if config is not None and not isinstance(config, DeepSeekConfig):
        raise ConfigError(f"config must be a DeepSeekConfig or None, got {type(config).__name__}")
    for name, value in fields.items():
        DeepSeekConfig.check(name, value)  # each on its own, before comparing them with the stored ones
    if not isinstance(checkpoint, PackedCheckpoint):
        if section is not None and not isinstance(checkpoint, GgufCheckpoint):
            method = section.get("quant_method") if isinstance(section, dict) else section
            raise CheckpointError(
                f"is quantized by {method!r}, which is not supported (supported: {', '.join(METHODS)}); use the original model",
                file=checkpoint.path,
            )
        return DeepSeekConfig(**{**(config.to_dict() if config else {}), **fields})
    stored, manifest = DeepSeekConfig.from_dict(section).to_dict(), checkpoint.manifest
    given = {**(config.to_dict() if config else {}), **fields}
    packed = {name: stored[name] for name in ("kl_budget", "formats", "calibration")}
    extension = ("context_extension", "context_length")
    if all(given.get(name) is None for name in extension):  # an extension is already in its config.json
        packed |= {name: stored[name] for name in extension}
    wanted = given.get("precision", "auto")
    formats = set(manifest.formats().values())
    if wanted not in ("auto", stored["precision"]) and formats != {wanted}:
        raise CheckpointError(
            f"is packed as {', '.join(sorted(formats))}, not {wanted}; convert the original checkpoint instead",
            file=checkpoint.path,
        )
    if given.get("kl_budget") not in (None, stored["kl_budget"]) or _other_formats(given.get("formats"), manifest):
        raise CheckpointError(
            "is already packed in other formats; convert the original checkpoint with this kl_budget or formats instead",
            file=checkpoint.path,
        )
    if given.get("calibration") not in (None, "none", BUILT_IN_TEXT, stored["calibration"]):
        raise CheckpointError(
            "is already packed, and calibration applies only when packing; convert the original checkpoint with this text",
            file=checkpoint.path,
        )
    if wanted != "auto":
        packed["kl_budget"] = None  # all matrices have one format
    return DeepSeekConfig(**{**stored, **given, **packed})


def _other_formats(given: dict[str, str] | None, manifest: Manifest) -> bool:
    """Whether `formats` names other formats than the packed modules have, or modules that do not exist."""
    wanted, formats = DeepSeekConfig(formats=given), manifest.formats()
    if wanted.unmatched(formats):
        return True
    return any(wanted.named_format(module) not in (None, format) for module, format in formats.items())


def _empty_model(raw: dict[str, Any], settings: DeepSeekConfig, path: Path) -> Any:
    """The model on the meta device, except for the buffers that it computes from its config."""
    from transformers import CONFIG_MAPPING

    try:
        hf_config = extended(CONFIG_MAPPING[raw["model_type"]].from_dict(raw), settings)
        model_class: Any = causal_lm_class(type(hf_config))
        with torch.device("meta"):
            model = model_class(hf_config)
    except DeepSeekOptimizerError:
        raise
    except Exception as error:  # a wrong field that only Transformers reads may cause any error there
        raise ConfigError(f"{path}: Transformers cannot use this config: {' '.join(str(error).split())}") from error
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Embedding):
                continue  # is replaced by a packed one; Gemma's has a buffer
            if child is not None and any(child._buffers[b].is_meta for b in child._non_persistent_buffers_set):
                parent._modules[name] = type(child)(config=model.config)  # rotary embeddings: buffers computed from the config
    return model


def _float_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype that Transformers loads a checkpoint in: the config's or, if that has none, that of the first tensor by name. A
    GGUF file's is fp32, in which llama.cpp's converter stores vectors."""
    if (given := _DTYPES.get(str(config.dtype).removeprefix("torch."))) is not None:
        return given
    if isinstance(checkpoint, GgufCheckpoint):
        return torch.float32
    stored = (info.dtype for info in sorted(checkpoint.tensors.values(), key=lambda info: info.name))
    return next((_FLOATS[dtype] for dtype in stored if dtype in _FLOATS), torch.bfloat16)


def _fill(model: Any, weights: Iterable[tuple[str, PackedWeight | torch.Tensor]], device: torch.device) -> None:
    """Sets a model's weights. Each goes to the device before the next one is read."""
    for name, value in weights:
        path, _, leaf = name.rpartition(".")
        module, data = model.get_submodule(path), value.data if stays_on_host(model, name) else value.data.to(device)
        if leaf in module._buffers:
            module._buffers[leaf] = data
        else:
            module._parameters[leaf] = nn.Parameter(data, requires_grad=False)
    for target, source in dict(model.all_tied_weights_keys or {}).items():
        path, _, leaf = target.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = model.get_parameter(source)


def plain_dtypes(model: Any, checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The dtypes of a model's floating-point tensors that are not packed, by name; those without a name are held as stored.

    They are those that Transformers loads them in, except that the weights in `fp32_weights` are always fp32, and the others of
    `exact_weights` have the model's dtype: where it is fp16, Transformers' own code could not run otherwise. Tensors of packed
    files have these dtypes already, and GGUF files have a dtype for each tensor, and none for the model.

    Args:
        model: from `sketch`.
        checkpoint: what it is loaded from.
    """
    graph, own = whole_graph(model), model_dtype(model)
    kept, as_stored = kept_in_fp32(model, own), isinstance(checkpoint, GgufCheckpoint | PackedCheckpoint)
    dtypes = {
        name: torch.float32 if kept.search(name) else own
        for name, format in expected_tensors(model)[0].items()
        if format is None and not (as_stored and own != torch.float32)
    }
    return {**dtypes, **dict.fromkeys(exact_weights(graph), own), **dict.fromkeys(fp32_weights(graph), torch.float32)}


def weights_for(
    model: Any,
    checkpoint: Checkpoint,
    packer: Packer,
    progress: Callable[[LoadProgress], None] | None = None,
    order: Sequence[str] | None = None,
    piece_bytes: int | None = None,
    parts: Mapping[str, Part] = NO_PARTS,
) -> Iterator[tuple[str, PackedWeight | torch.Tensor]]:
    """Yields the weights of a model from `sketch`, as `stream_weights` does, in the dtypes of `plain_dtypes`.

    Args:
        model: from `sketch`.
        checkpoint: the checkpoint.
        packer: packs a panel of rows.
        progress, order, piece_bytes, parts: as in `stream_weights`.

    Raises:
        CheckpointError: as in `stream_weights`; or a tied weight is stored with different values.
    """
    dtypes = plain_dtypes(model, checkpoint)
    wanted, shapes = expected_tensors(model)
    for pair in dict(model.all_tied_weights_keys or {}).items():
        if pair[0] in checkpoint.tensors:
            _check_same(checkpoint, *pair)
    ignored = not_wanted(checkpoint, model)
    streamed = stream_weights(checkpoint, wanted, shapes, packer, progress, ignored, order, piece_bytes, parts)
    for name, value in streamed:
        dtype = dtypes.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and dtype is not None:
            value = value.to(dtype)
        yield name, value
        del value  # only the caller may keep it alive


def not_wanted(checkpoint: Checkpoint, model: Any) -> list[str]:
    """Name patterns of tensors in a checkpoint that a load may ignore: those that the model computes itself, tied weights, and
    tensors of MTP layers that are not loaded.

    Raises:
        CheckpointError: as in `stored_mtp_layers`.
    """
    tied = list(model.all_tied_weights_keys or ())
    layers = stored_mtp_layers(checkpoint, model.config)
    return [*IGNORED, *map(re.escape, (*tied, *(tensor for layer in layers for tensor in layer)))]


def _check_same(checkpoint: Checkpoint, target: str, source: str) -> None:
    """Raises CheckpointError if `target`, which the config ties to `source`, is stored with other values."""
    if not same_tensor(checkpoint, target, source):
        raise CheckpointError(
            f"differs from {source}, though config.tie_word_embeddings is true; set it to false",
            file=checkpoint.info(target).file,
            tensor=target,
        )


def name_source(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Records in a model's config the path and dtype it was loaded with, and loads the checkpoint's generation config.

    Raises:
        CheckpointError: generation_config.json cannot be read.
    """
    model.config.dtype = dtype
    path = checkpoint.path
    model.config._name_or_path = str(path)
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(path))
        except Exception as error:
            raise CheckpointError(f"cannot be read: {error}", file=path / "generation_config.json") from error
    elif checkpoint.sampling and model.generation_config is not None:
        samples = bool(checkpoint.sampling.keys() - {"repetition_penalty"})
        model.generation_config.update(**checkpoint.sampling, do_sample=samples or None)


@contextmanager
def show_reading(checkpoint: Checkpoint, doing: str = "Loading") -> Iterator[Callable[[LoadProgress], None] | None]:
    """Shows the progress of reading a checkpoint's files; yields the callback for `stream_weights`.

    Packed files that are mapped are not read: for these it yields None.
    """
    if isinstance(checkpoint, PackedCheckpoint) and checkpoint.mapper is not None:
        yield None
        return
    with show_progress(f"{doing} {checkpoint.path.name}", unit="bytes") as progress:
        yield lambda p: progress(p.done_bytes, p.total_bytes)
