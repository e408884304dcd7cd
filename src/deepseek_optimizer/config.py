"""`DeepSeekConfig`: the validated settings of what to optimize and how."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from deepseek_optimizer.errors import ConfigError
from deepseek_optimizer.graph.attention_mode import AttentionMode
from deepseek_optimizer.graph.parallel import Parallel
from deepseek_optimizer.graph.rules import RULES
from deepseek_optimizer.quant import FORMATS, QUANT_METHOD, VIEWS, get_format
from deepseek_optimizer.system.backend_entries import AUTO, BUILT_IN, names

FUSION_RULES: Final = tuple(RULES)
MAX_THREADS: Final = 1024

Precision = Literal["auto", "int3", "int4", "q4_1", "int8", "int8_nested", "fp8", "bf16", "fp32"]
Attention = Literal["flash", "eager", "sliding", "sparse"]
KvCache = Literal["auto", "fp32", "bf16", "int8", "fp8", "int4"]
Isa = Literal["avx2", "avx512", "amx", "neon"]
Activation = Literal["auto", "int8", "int16", "fp8"]
Mtp = Literal["auto", "off"]
Vision = Literal["auto", "off"]
ContextExtension = Literal["yarn", "dynamic"]

# Default window in tokens by attention mode; sparse attention selects further tokens itself.
WINDOWS: Final = {"sliding": 4096, "sparse": 512}

BUILT_IN_TEXT: Final = "auto"  # value of `calibration`

_LONG: Final = ("formats",)  # omitted from `repr`


def _one_of(*allowed: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
        return value

    return check


def _backend(name: str, value: Any) -> str:
    """Checks for "auto" or a registered name. Other packages' entry points are only read for names that are not built in."""
    known = (AUTO, *BUILT_IN)
    if isinstance(value, str) and value in known:
        return value
    try:
        checked: str = _one_of(*dict.fromkeys((*known, *names())))(name, value)
    except ConfigError as error:
        raise ConfigError(f"{error}; to use a backend of another package, install that package") from None
    return checked


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        return value

    return check


def _check_precision(precision: str, kl_budget: float | None, **_: Any) -> None:
    if kl_budget is not None and precision != "auto":
        raise ConfigError(
            f"kl_budget chooses the formats itself and conflicts with precision={precision!r}; leave precision at 'auto', "
            "or set the formats of single matrices in formats"
        )


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _rules(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} must be a list of rule names or None (all), got {value!r}")
    check = _one_of(*FUSION_RULES)
    return tuple(dict.fromkeys(check(name, rule) for rule in value))


def _range(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = (_integer(1, 4096)(name, v) for v in value)
        if low <= high:
            return low, high
    raise ConfigError(f"{name} must be (smallest, largest) batch size with 1 <= smallest <= largest, got {value!r}")


def _path(name: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:  # no system allows NUL in a path
        raise ConfigError(f"{name} must be the path of a text file or None, got {value!r}")
    return text


def _calibration(name: str, value: Any) -> str | None:
    """The path of a text, `BUILT_IN_TEXT`, or None, also written as "none"."""
    return None if value is None or value == "none" else _path(name, value)


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _formats(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(module, str) for module in value):
        raise ConfigError(f"{name} must be a dict from module names to format names, got {value!r}")
    try:
        if views := [view for view in VIEWS if view in value.values()]:
            raise ConfigError(f"{views[0]!r} is only read out of another format; choose one of {', '.join(FORMATS)}")
        return {module: get_format(format).name for module, format in value.items()}
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


@dataclass(repr=False)
class DeepSeekConfig(QuantizationConfigMixin):
    """How to optimize a model. Can be passed as `quantization_config` to Transformers.

    Every field is checked whenever it is set, and unknown names are rejected. The config contains only the user's settings, and
    the package never modifies a config passed to it. Properties of a packed model are in its `checkpoint.manifest.Manifest`
    (`model.dso.manifest`).

    Attributes:
        precision: format of the weight matrices: "int3" (3.25 bits per weight), "int4" (4.5 bits), "q4_1" (5 bits, with a
            minimum), "int8", "int8_nested" (int8 that contains an int4 matrix, so that requests to an engine can choose a
            `quality`), "fp8" (E4M3, blocks of 128 x 128), "bf16", "fp32", or "auto": the stored format, without loss (a
            float model's dtype; the formats of a GGUF, FP8 or packed checkpoint, except that F16 and F32 in a GGUF file become
            bf16).
        kernel_fusion: False disables all fusion rules; results stay the same within the format's tolerance.
        fusion_rules: names of the fusion rules to apply (`FUSION_RULES`); None: all.
        attention_optimization: attention mode: "flash" (every token attends to all earlier tokens; online softmax, no score
            matrix), "eager" (the same with a full score matrix; disables the rule `attention_softmax`), "sliding" (a token
            attends to the latest `attention_window` tokens and the first `attention_sinks`; the cache drops the rest), or
            "sparse" (a token attends to at most `attention_budget` tokens, in blocks of 32: the sinks, the window, and the
            blocks that its query ranks highest). The last two change answers when relevant tokens are not visible; their cost
            grows linearly with length.
        attention_window: size of the window in tokens; None: 4096 with "sliding", 512 with "sparse".
        attention_sinks: number of sinks, in tokens.
        attention_budget: maximum number of visible tokens with "sparse".
        sparse_attention: True means attention_optimization="sparse" with an int8 cache (if `kv_cache` is "auto" and not all
            weights are fp32), which halves the memory for long texts.
        kv_cache: storage of keys and values: "fp32", "bf16", "int8", "fp8" (E4M3, not on backend `cpu`), "int4", or
            "auto": fp32 if all weights are fp32, int8 with `sparse_attention`, bf16 otherwise.
        kv_cache_memory: maximum size of the cache in bytes, allocated as it is used. None: the memory that is free when the
            first cache is created, less a reserve; for an engine or server the size that a full batch needs, but at most half
            of free memory.
        threads: number of worker threads of the native backend; None: the environment variable DSO_THREADS, or else one per
            core, within CPU affinity and cgroup limits.
        isa: instruction set to use: "avx2", "avx512", "amx" or "neon"; None: the environment variable DSO_ISA, or else the best
            one that this machine supports.
        backend: "cpu" (native), "cuda" (Triton, not tested on a card yet), "reference" (plain torch), the name of a backend
            registered by another package (see `backends/registry.py`), or "auto": the best one that can run on the model's
            device.
        cuda_graphs: on backend "cuda", capture small steps as CUDA graphs and replay them, which takes one call of the driver
            instead of one for each kernel. The results have the same bits.
        cpu_expert_layers: on backend "cuda", the routed experts of this many layers, the first ones, stay in the host's memory
            and run on the CPU; 0: none. None: as many as do not fit in the device's free memory beside the other weights, the
            cache (`kv_cache_memory`, or 8,192 tokens) and the buffers.
        activation: format of activations in integer products: "int8", "int16", or "auto": the one that the weight format needs.
            With "int8", attention of models without a plan multiplies in bf16. "fp8": products of more than four rows with
            FP8 weights also round rows to E4M3, with a scale for each 128 columns; on backend "cuda", for cards of compute
            capability 8.9 and later, and in the reference.
        batch_invariant: use one kernel family for prefill and decode, so that results do not depend, bit for bit, on chunking
            or recomputation.
        prefill_chunk: maximum number of tokens in one prefill step; limits the size of the plan's buffers.
        batch_size_range: (smallest, largest) number of sequences to allocate buffers for.
        fast_path: run plain `generate` calls without Transformers' overhead per token; the tokens are the same.
        mtp: "auto": load the layers for multi-token prediction if the checkpoint has them, for `generate(use_mtp=True)`;
            "off": never load them.
        vision: "auto": of a checkpoint of Qwen3.5 or Gemma 4, `load_model` loads the whole model, which reads pictures too,
            unless other settings need a plan of the whole model; "off": its language model alone. `from_pretrained` loads what
            its class contains.
        context_extension: extends the context beyond the trained length, if the model's config does not scale RoPE already:
            "yarn" (one set of frequencies for all lengths; results for short texts change slightly too) or "dynamic" (NTK
            scaling: texts within the trained length are unchanged; a longer one uses the frequencies for the length that it
            may reach). Quality beyond the trained length is not guaranteed: measure it.
        context_length: context length in tokens, with `context_extension`.
        calibration: text on which the original model runs, to round int3, int4 and q4_1 such that its results change least: the
            path of a UTF-8 text file, a few pages typical of what the model will process; "auto": a built-in text, if that
            takes less than a minute or with `kl_budget` (never if the environment variable DSO_CALIBRATION is "none"); or None
            or "none": each weight is rounded to the nearest value. `dso convert` uses "auto" by default, except with
            `kl_budget`; a load would take that time every time.
        kl_budget: only with precision "auto": chooses the smallest format of each matrix such that the mean KL divergence from
            the original model stays within this many nats per token, measured on a part of the calibration text (without one,
            on a text that every Python installation contains). With a text, weights are rounded with compensation. int8
            everywhere costs a few thousandths, int4 a few tenths. None: no loss is allowed.
        strict: True: a model without an execution plan (an unknown family, or a feature that its plan does not support) raises
            UnsupportedModelError. False: it takes the general path: Transformers' own forward with packed linear layers.
        formats: formats of single matrices by module name, such as {"lm_head": "int8"}, or of all modules that match a pattern
            with *, such as {"model.layers.*.mlp.experts.*": "int8"}; overrides `precision`. A name overrides patterns; of
            several matching patterns the first is used. With `kl_budget`, only the formats of the other matrices are chosen.
        parallel: over how many processes `load_model` divides the model. {"tensor": 2}: each process has a part of every layer,
            of the cache and of the vocabulary, and `threads` threads (None: its share of those that this process may use).
            {"expert": 2}: the same, but each has some of the routed experts, undivided. {"pipeline": 2}: each has some of the
            layers, and their cache. The caller's process is the first of them, and the others end with it; on several machines,
            all are started with the environment variables of torchrun. Such a model can neither be saved nor moved.
    """

    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # Transformers' enum cannot take new members
    precision: Precision = "auto"
    kernel_fusion: bool = True
    fusion_rules: tuple[str, ...] | None = None
    attention_optimization: Attention = "flash"
    attention_window: int | None = None
    attention_sinks: int = 4
    attention_budget: int = 2048
    sparse_attention: bool = False
    kv_cache: KvCache = "auto"
    kv_cache_memory: int | None = None
    threads: int | None = None
    isa: Isa | None = None
    backend: str = "auto"
    cuda_graphs: bool = True
    cpu_expert_layers: int | None = None
    activation: Activation = "auto"
    batch_invariant: bool = False
    prefill_chunk: int = 512
    batch_size_range: tuple[int, int] = (1, 32)
    fast_path: bool = True
    mtp: Mtp = "auto"
    vision: Vision = "auto"
    context_extension: ContextExtension | None = None
    context_length: int | None = None
    calibration: str | None = None
    kl_budget: float | None = None
    strict: bool = False
    formats: dict[str, str] | None = None
    parallel: Parallel = Parallel()  # noqa: RUF009  # immutable

    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "quant_method": _one_of(QUANT_METHOD),
        "precision": _one_of("auto", "int3", "int4", "q4_1", "int8", "int8_nested", "fp8", "bf16", "fp32"),
        "kernel_fusion": _flag,
        "fusion_rules": _optional(_rules),
        "attention_optimization": _one_of("flash", "eager", "sliding", "sparse"),
        "attention_window": _optional(_integer(1, 1 << 24)),
        "attention_sinks": _integer(0, 1024),
        "attention_budget": _integer(1, 1 << 20),
        "sparse_attention": _flag,
        "kv_cache": _one_of("auto", "fp32", "bf16", "int8", "fp8", "int4"),
        "kv_cache_memory": _optional(_integer(1 << 16, 1 << 60)),
        "threads": _optional(_integer(1, MAX_THREADS)),
        "isa": _optional(_one_of("avx2", "avx512", "amx", "neon")),
        "backend": _backend,
        "cuda_graphs": _flag,
        "cpu_expert_layers": _optional(_integer(0, 1 << 16)),
        "activation": _one_of("auto", "int8", "int16", "fp8"),
        "batch_invariant": _flag,
        "prefill_chunk": _integer(1, 1 << 20),
        "batch_size_range": _range,
        "fast_path": _flag,
        "mtp": _one_of("auto", "off"),
        "vision": _one_of("auto", "off"),
        "context_extension": _optional(_one_of("yarn", "dynamic")),
        "context_length": _optional(_integer(1, (1 << 31) - 1)),
        "calibration": _calibration,
        "kl_budget": _optional(_above_zero),
        "strict": _flag,
        "formats": _optional(_formats),
        "parallel": lambda name, value: Parallel.of(value),
    }

    def __new__(cls, *args: Any, **given: Any) -> DeepSeekConfig:
        for name in given:  # checked before the generated __init__, whose TypeError could not suggest the closest field
            cls._check_of(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.context_extension is not None and self.context_length is None:
            raise ConfigError(
                f"context_extension={self.context_extension!r} needs context_length, a number of tokens such as 32768"
            )
        if self.context_length is not None and self.context_extension is None:
            raise ConfigError(f"context_length={self.context_length} needs context_extension, which is 'yarn' or 'dynamic'")
        _ = self.attention  # raises an error for conflicting settings before anything is loaded

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):  # private names are Transformers' own bookkeeping
            value = self._check_of(name)(name, value)
        if name in ("precision", "kl_budget"):
            _check_precision(**{"precision": "auto", "kl_budget": None, **self.__dict__, name: value})
        object.__setattr__(self, name, value)

    @classmethod
    def _check_of(cls, name: str) -> Callable[[str, Any], Any]:
        if name not in cls._checks:
            near = difflib.get_close_matches(name, cls._checks, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(cls._checks)}"
            raise ConfigError(f"DeepSeekConfig has no field {name!r}; {hint}")
        return cls._checks[name]

    @classmethod
    def check(cls, name: str, value: Any) -> None:
        """Raises ConfigError if there is no field `name`, or `value` is invalid for it."""
        cls._check_of(name)(name, value)

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules to apply, in the order of application."""
        enabled: tuple[str, ...] = FUSION_RULES if self.fusion_rules is None else self.fusion_rules
        if not self.kernel_fusion:
            enabled = ()
        if self.attention_optimization == "eager":
            enabled = tuple(r for r in enabled if r != "attention_softmax")
        return tuple(r for r in FUSION_RULES if r in enabled)

    @property
    def attention(self) -> AttentionMode:
        """The attention mode with its window, sinks and budget. Raises ConfigError if settings conflict."""
        mode: str = self.attention_optimization
        if self.sparse_attention:
            if mode not in ("flash", "sparse"):
                raise ConfigError(f"sparse_attention=True and attention_optimization={mode!r} conflict; choose one")
            mode = "sparse"
        if mode not in WINDOWS:
            return AttentionMode()
        window = WINDOWS[mode] if self.attention_window is None else self.attention_window
        return AttentionMode(mode, window, self.attention_sinks, self.attention_budget)  # type: ignore[arg-type]

    @property
    def calibration_file(self) -> str | None:
        """The path of the user's calibration text; None: there is none."""
        return None if self.calibration == BUILT_IN_TEXT else self.calibration

    def format_of(self, weight: str, natural: str, min_format: str | None = None) -> str:
        """Returns the name of the format to pack one weight matrix of an original model in.

        With a `kl_budget` that is `natural`: the model is first packed without loss, then measured to choose other formats.

        Args:
            weight: name of the parameter.
            natural: the format that is lossless for this matrix.
            min_format: the smallest format that `precision` may select; one named in `formats` may be smaller.
        """
        if self.kl_budget is not None:
            return natural
        if (named := self.named_format(weight.removesuffix(".weight"))) is not None:
            return named
        if self.precision == "auto":
            return natural
        return self.precision if min_format is None else larger(self.precision, min_format)

    def named_format(self, module: str) -> str | None:
        """Returns the format that `formats` has for a module: by its name, or else by the first matching pattern."""
        formats = self.formats or {}
        return formats.get(module) or next((f for entry, f in formats.items() if _matches(entry, module)), None)

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """Returns the entries of `formats` that match none of these modules."""
        return [e for e in self.formats or () if e not in modules and not any(_matches(e, module) for module in modules)]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Creates a config from a dict made by `to_dict`, as Transformers does when it reads config.json.

        Raises:
            ConfigError: a field is unknown or invalid, or the dict is from a checkpoint packed by an earlier version.
        """
        if "modules" in config_dict:
            raise ConfigError(
                f"quantization_config.format_version {config_dict.get('format_version')!r}: this checkpoint was packed by an "
                "earlier version and its layout is no longer supported; convert the original again"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types; `from_dict` restores an equal config."""
        return {f.name: _jsonable(getattr(self, f.name)) for f in fields(self)}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name not in _LONG}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return f"DeepSeekConfig({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def larger(*formats: str) -> str:
    """Returns the format with the most bits per weight; the first one if several are equal."""
    return max(formats, key=lambda name: get_format(name).bits)


def _matches(entry: str, module: str) -> bool:
    """Whether an entry of `formats` is a pattern that matches the module's name; * matches any characters."""
    return "*" in entry and re.fullmatch(".*".join(map(re.escape, entry.split("*"))), module) is not None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Parallel):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)
