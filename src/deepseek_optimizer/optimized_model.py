"""`load_model` and `DynamicGraphOptimizer`: ways to get an optimized model besides `from_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .config import DeepSeekConfig
from .errors import ConfigError


def load_model(
    path: str | os.PathLike[str],
    config: DeepSeekConfig | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    device: Any = None,
    profile: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> Any:
    """Loads a checkpoint as an optimized Transformers model, ready to generate.

    A model of a supported family runs as an execution plan. Any other model that Transformers has (causal, encoder,
    encoder-decoder, classifier) takes the general path: Transformers' own forward, cache and `generate`, with linear layers
    packed and computed by this package. `model.report()` says which path it is and what runs natively; `strict=True` refuses
    the general path.

    Weights are packed while they are read: besides the packed model, only memory for a panel of rows is needed. The weights of
    a packed checkpoint are mapped from its file instead. While the model is in use, that file may be replaced (as
    `save_pretrained` and `dso convert` do); the model continues to use the weights it loaded. If the file is written to or
    truncated, every later call raises CheckpointChangedError.

    Args:
        path: a directory of safetensors files (float, packed, or quantized by another tool), a .gguf file, or a model name on
            the hub.
        config: how to optimize the model; None: only lossless optimizations.
        adapter: a directory with an adapter of PEFT, loaded as "default" by Transformers' `load_adapter`. The plan adds
            what LoRA on linear layers adds; calls with other adapters run Transformers' own forward, with a warning. Of
            Qwen3.5 and Gemma 4, the language model is then loaded alone.
        device: where to: "cpu", "cuda", "cuda:1", ...; weights go to a CUDA device as they are packed, and a model with a plan
            runs on backend "cuda" there, unless `backend` names another. None: the CPU, or with backend "cuda" the first CUDA
            device.
        profile: settings that `dso tune` found: "auto": those for this model on this machine, if there are any; or the path of
            a profile. `fields`, and what `config` sets to other values than the defaults, come first. What was taken, or why
            nothing was, is in `model.report()`. None: no profile is used.
        fields: single fields of `DeepSeekConfig`; they override those of `config`.

    Returns:
        The family's `ForCausalLM` model in eval mode; for models that see (unless `vision` is "off"), encoders and on the
        general path the class that the checkpoint was saved from. `model.report()` lists the optimizations. Load other classes
        (`AutoModel`, classifiers) with their own `from_pretrained(path, quantization_config=config)`.

    Raises:
        CheckpointError: a file is damaged, incomplete or inconsistent; names the file and tensor. Pickles are never opened.
        CheckpointChangedError: a file was modified while it was read.
        BackendError: the backend cannot run on the device; the message says what is missing.
        ConfigError: a field, the device, or the checkpoint's config.json, is invalid or not supported.
        NotEnoughMemoryError: the weights do not fit in free memory; raised before any are read.
        UnsupportedModelError: the model has no plan, and `strict` is set or Transformers does not have it either.
        DataError: the file that `profile` names is not a profile.
    """
    from .integration.load.loader import load

    taken, note = None, None
    if profile is not None:
        from .integration.load.resolve import resolve
        from .profiles import find

        taken, note = find(resolve(path), profile, profile_options(config, fields))
        tuned = {} if taken is None else dict(taken.fields)
        if fields.get("kl_budget", config and config.kl_budget) is not None:
            tuned.pop("precision", None)  # the budget chooses formats itself
        fields = {**_unset(config, tuned), **fields}
    if adapter is not None:
        from .integration.load.ranks import check_no_adapter

        check_no_adapter(config, fields)
    alone = "" if adapter is None else "an adapter is loaded into its language model"
    model = load(path, config, fields, alone, device)
    model.dso.profile, model.dso.profile_note = taken, note
    if adapter is not None:
        model.load_adapter(os.fspath(adapter))
    return model


def profile_options(config: DeepSeekConfig | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a profile must have been found with, see `profiles.find`: set by `fields`, or else by `config`.

    Raises:
        ConfigError: `parallel` is invalid.
    """
    from .graph.parallel import Parallel
    from .profiles import OPTIONS

    plain = DeepSeekConfig()
    values = {name: fields.get(name, getattr(config or plain, name)) for name in OPTIONS}
    values["parallel"] = Parallel.of(values["parallel"])  # a dict may name what is divided by 1
    options = {name: value for name, value in values.items() if value != getattr(plain, name)}
    if "parallel" in options:
        options["parallel"] = {name: count for name, count in options["parallel"].to_dict().items() if count > 1}
    return options


def _unset(config: DeepSeekConfig | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields that `config` leaves at their defaults."""
    plain = DeepSeekConfig()
    return {name: value for name, value in fields.items() if config is None or getattr(config, name) == getattr(plain, name)}


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer of a checkpoint and checks it against the size of the embedding.

    Args:
        path: as for `load_model`.

    Raises:
        CheckpointError: the tokenizer is missing or invalid.
        ConfigError: the checkpoint's config.json is invalid. Transformers reads it too, and would report a tokenizer error.
    """
    from .checkpoint import load_tokenizer as load
    from .checkpoint import open_checkpoint
    from .integration.load.general import why_general_path
    from .integration.load.resolve import resolve

    with open_checkpoint(resolve(path)) as checkpoint:
        why_general_path(checkpoint, None, {})  # raises what load_model would
        return load(checkpoint)


def report(model: Any) -> Any:
    """Returns the report of an optimized model. `print` shows it as a table, `.to_dict()` returns its values."""
    from .integration.bind.packed_model import packed_model_of

    return packed_model_of(model).report()


class DynamicGraphOptimizer:
    """Optimizes a model that is already loaded, in place.

    Args:
        model: a Transformers model, either float or optimized before (then only rules and batch sizes change). One without an
            execution plan takes the general path, see `load_model`.
        fusion_rules: names of the fusion rules to apply; None: those of `config`.
        batch_size_range: (smallest, largest) batch size to allocate buffers and warm up kernels for; None: that of `config`.
        config: how to optimize the model; None: the weights keep their dtype.

    Raises:
        ConfigError, UnsupportedModelError: at construction, before the model is modified.
    """

    def __init__(
        self,
        model: Any,
        fusion_rules: Sequence[str] | None = None,
        batch_size_range: tuple[int, int] | None = None,
        config: DeepSeekConfig | None = None,
    ) -> None:
        from .integration.bind.context_extension import extended
        from .integration.bind.graphs import plan_graph
        from .integration.bind.swap import NATURAL
        from .integration.general import check_settings, why_general
        from .integration.load.ranks import check_undivided
        from .integration.multimodal import is_whole, why_no_language_plan

        if config is not None and not isinstance(config, DeepSeekConfig):
            raise ConfigError(f"config must be a DeepSeekConfig or None, got {type(config).__name__}")
        overrides = {"fusion_rules": fusion_rules, "batch_size_range": batch_size_range}
        fields = {} if config is None else config.to_dict()
        self.config = DeepSeekConfig(**{**fields, **{name: value for name, value in overrides.items() if value is not None}})
        check_undivided(self.config)
        if getattr(model, "hf_quantizer", None) is not None and "dso" not in model.__dict__:
            raise ConfigError("the model is quantized by another method; load the original model")
        earlier = getattr(model, "__dict__", {}).get("dso")
        if earlier is not None:
            check_undivided(earlier.config)
        chosen_for = earlier.config.kl_budget if earlier is not None else None
        if self.config.kl_budget not in (None, chosen_for):
            raise ConfigError("kl_budget needs the model's tokenizer and calibration text; use load_model or `dso convert`")
        if self.config.calibration_file is not None:
            raise ConfigError("calibration needs the model's files and tokenizer; use load_model or `dso convert`")
        if not hasattr(model, "config"):
            raise ConfigError(f"expected a Transformers model, got {type(model).__name__}")
        self.no_plan = why_general(model.config, self.config.strict)
        if self.no_plan is None:
            plan_graph(model.config, self.config.rules, mode=self.config.attention)
            extended(model.config, self.config)
        else:
            check_settings(self.config, self.no_plan, is_whole(model) and why_no_language_plan(model.config) is None)
        if (dtype := getattr(model, "dtype", None)) not in NATURAL:
            raise ConfigError(f"a model of dtype {dtype} cannot be packed; use model.float() or model.bfloat16() first")
        if model.device.type == "meta":
            raise ConfigError("the model is on the meta device, so it has no weights; load them first")
        self.model = model

    def optimize(self) -> Any:
        """Packs the weights module by module, frees each original as it is replaced, and makes the model run the plan, if it
        has one.

        Returns: the same model object.
        """
        from .integration.load.optimize_in_place import optimize_in_place

        optimize_in_place(self.model, self.config, self.no_plan)
        return self.model

    def report(self) -> Any:
        """Returns a report of the applied rules, kernels, instruction set, formats, and the sizes before and after.

        Call it after `optimize()`.
        """
        return report(self.model)
