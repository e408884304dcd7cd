"""`DeepSeekConfig`: one validated description of what to optimise."""

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
from deepseek_optimizer.graph.rules import RULES
from deepseek_optimizer.quant import get_format
from deepseek_optimizer.system.backend_entries import AUTO, BUILT_IN, names

QUANT_METHOD: Final = "deepseek_optimizer"
FUSION_RULES: Final = tuple(RULES)
MAX_THREADS: Final = 1024

Precision = Literal["auto", "int4", "q4_1", "int8", "fp8", "bf16", "fp32"]
Attention = Literal["flash", "eager", "sliding", "sparse"]
KvCache = Literal["auto", "fp32", "bf16", "int8"]
Isa = Literal["avx2", "avx512", "amx"]
Activation = Literal["auto", "int8", "int16"]
Mtp = Literal["auto", "off"]
ContextExtension = Literal["yarn", "dynamic"]

# Tokens of the window where the config does not say: sparse attention chooses the rest.
WINDOWS: Final = {"sliding": 4096, "sparse": 512}

_LONG: Final = ("formats",)  # left out where a config is shown


def _one_of(*allowed: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
        return value

    return check


def _backend(name: str, value: Any) -> str:
    """ "auto" or a registered name. Other packages' entry points are only read for a name that is not built in."""
    known = (AUTO, *BUILT_IN)
    if isinstance(value, str) and value in known:
        return value
    try:
        checked: str = _one_of(*dict.fromkeys((*known, *names())))(name, value)
    except ConfigError as error:
        raise ConfigError(f"{error}; a backend of another package can be named once that package is installed") from None
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


def _agree(precision: str, kl_budget: float | None, **_: Any) -> None:
    if kl_budget is not None and precision != "auto":
        raise ConfigError(
            f"kl_budget chooses the formats itself, so precision={precision!r} cannot be kept; leave precision at 'auto', "
            "or name single matrices in formats"
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
    if not isinstance(text, str) or not text.strip() or "\0" in text:  # no system takes a path with a NUL in it
        raise ConfigError(f"{name} must be the path of a text file or None, got {value!r}")
    return text


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _formats(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(module, str) for module in value):
        raise ConfigError(f"{name} must map names of modules to names of formats, got {value!r}")
    try:
        return {module: get_format(format).name for module, format in value.items()}
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


@dataclass(repr=False)
class DeepSeekConfig(QuantizationConfigMixin):
    """What to optimise and how; also Transformers' `quantization_config`.

    Every field is checked when it is set, at construction and later. Unknown names are refused. It holds the user's settings
    only, and nothing here changes a config that it is given; what is known about a packed model is in its
    `checkpoint.manifest.Manifest` (`model.dso.manifest`).

    Attributes:
        precision: format of the weight matrices: "int4" (4.5 bits a weight), "q4_1" (5 bits, with a minimum), "int8",
            "fp8" (E4M3, blocks of 128 x 128), "bf16", "fp32", or "auto": as they are, without loss (a float model in its own
            dtype, a GGUF file's, FP8 or packed checkpoint's own formats; but F16 and F32 of a GGUF file become bf16).
        kernel_fusion: False leaves every fusion rule out; results stay the same within the format's tolerance.
        fusion_rules: names of the rules to apply (`FUSION_RULES`); None is all of them.
        attention_optimization: "flash" (every token sees all before it; online softmax, no score matrix), "eager" (the same
            with scores in full; leaves the rule `attention_softmax` out), "sliding" (a token sees the latest `attention_window`
            tokens and the first `attention_sinks`; the cache forgets the rest), or "sparse" (it sees `attention_budget` tokens
            at most: blocks of 32 that hold the sinks, the window, and those that its query ranks highest). The last two change
            answers where something is hidden; their cost grows in proportion to length.
        attention_window: tokens; None: 4096 with "sliding", 512 with "sparse".
        attention_sinks: tokens.
        attention_budget: tokens, of "sparse".
        sparse_attention: True is attention_optimization="sparse" over a cache in int8 (where `kv_cache` is "auto" and not all
            weights are fp32): long texts in half the memory.
        kv_cache: storage of keys and values: "fp32", "bf16", "int8"; "auto" is fp32 where all weights are, int8 with
            `sparse_attention`, bf16 otherwise.
        kv_cache_memory: most bytes the cache may take, as it is used; None is what is free when the first cache is made, less a
            reserve, and of an engine or server what a full batch needs, within half of what is free.
        threads: worker threads of the native backend; None is the environment's DSO_THREADS, or else what affinity and
            cgroup limits allow.
        isa: instruction set to force: "avx2", "avx512" or "amx"; None is DSO_ISA, or else the best one here.
        backend: "cpu" (native), "reference" (plain torch), the name that another package registers its backend under (see
            `backends/registry.py`), or "auto": the best one that can run on the model's device.
        activation: bits of activations in integer products: "int8", "int16", or "auto": what the weight format needs.
        batch_invariant: one kernel family for prefill and decode, so that no chunking or recomputation changes a bit.
        prefill_chunk: most tokens in one prefill step; bounds the size of the plan's buffers.
        batch_size_range: (smallest, largest) number of sequences to size buffers for.
        fast_path: drive plain `generate` calls without Transformers' per-token overhead; the tokens are the same.
        mtp: "auto": layers for multi-token prediction are loaded where the checkpoint has them, for `generate(use_mtp=True)`;
            "off": never.
        context_extension: makes room for more tokens than the model was trained for, where its config does not scale RoPE
            already: "yarn" (one set of frequencies for all lengths; short texts change a little too) or "dynamic" (NTK scaling:
            a text within the trained length is as it was, a longer one has the frequencies for the tokens that it may get).
            Quality beyond the trained length is not assured: measure it.
        context_length: tokens to make room for, with `context_extension`.
        calibration: path of a UTF-8 text, some pages like those the model will see: `load_model` runs the original over it and
            weighs the rounding of int4 and q4_1 by how strongly each input column is used. None: all columns alike.
        kl_budget: only with precision "auto": the smallest formats are chosen, matrix by matrix, with which the mean KL
            divergence to the model as it is stays within this many nats a token, as measured on the calibration text (without
            one: on a text that every Python ships). int8 throughout costs some thousandths, int4 some tenths. None: no loss.
        formats: format of single matrices by module name, such as {"lm_head": "int8"}, or of all that a pattern with * fits,
            such as {"model.layers.*.mlp.experts.*": "int8"}; goes before `precision`. A name goes before patterns, of those the
            first that fits. With `kl_budget` the matrices named here keep these formats, and the others' are chosen.
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
    activation: Activation = "auto"
    batch_invariant: bool = False
    prefill_chunk: int = 512
    batch_size_range: tuple[int, int] = (1, 32)
    fast_path: bool = True
    mtp: Mtp = "auto"
    context_extension: ContextExtension | None = None
    context_length: int | None = None
    calibration: str | None = None
    kl_budget: float | None = None
    formats: dict[str, str] | None = None

    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {
        "quant_method": _one_of(QUANT_METHOD),
        "precision": _one_of("auto", "int4", "q4_1", "int8", "fp8", "bf16", "fp32"),
        "kernel_fusion": _flag,
        "fusion_rules": _optional(_rules),
        "attention_optimization": _one_of("flash", "eager", "sliding", "sparse"),
        "attention_window": _optional(_integer(1, 1 << 24)),
        "attention_sinks": _integer(0, 1024),
        "attention_budget": _integer(1, 1 << 20),
        "sparse_attention": _flag,
        "kv_cache": _one_of("auto", "fp32", "bf16", "int8"),
        "kv_cache_memory": _optional(_integer(1 << 16, 1 << 60)),
        "threads": _optional(_integer(1, MAX_THREADS)),
        "isa": _optional(_one_of("avx2", "avx512", "amx")),
        "backend": _backend,
        "activation": _one_of("auto", "int8", "int16"),
        "batch_invariant": _flag,
        "prefill_chunk": _integer(1, 1 << 20),
        "batch_size_range": _range,
        "fast_path": _flag,
        "mtp": _one_of("auto", "off"),
        "context_extension": _optional(_one_of("yarn", "dynamic")),
        "context_length": _optional(_integer(1, (1 << 31) - 1)),
        "calibration": _optional(_path),
        "kl_budget": _optional(_above_zero),
        "formats": _optional(_formats),
    }

    def __new__(cls, *args: Any, **given: Any) -> DeepSeekConfig:
        for name in given:  # before the generated __init__, whose TypeError could not name the nearest field
            cls._known(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.context_extension is not None and self.context_length is None:
            raise ConfigError(
                f"context_extension={self.context_extension!r} needs context_length, the tokens to make room for, such as 32768"
            )
        if self.context_length is not None and self.context_extension is None:
            raise ConfigError(
                f"context_length={self.context_length} needs context_extension, the way to make room: 'yarn' or 'dynamic'"
            )
        _ = self.attention  # settings that do not go together are an error here, before anything is loaded

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):  # private names are Transformers' own bookkeeping
            value = self._known(name)(name, value)
        if name in ("precision", "kl_budget"):
            _agree(**{"precision": "auto", "kl_budget": None, **self.__dict__, name: value})
        object.__setattr__(self, name, value)

    @classmethod
    def _known(cls, name: str) -> Callable[[str, Any], Any]:
        if name not in cls._checks:
            near = difflib.get_close_matches(name, cls._checks, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(cls._checks)}"
            raise ConfigError(f"DeepSeekConfig has no field {name!r}; {hint}")
        return cls._checks[name]

    @classmethod
    def check(cls, name: str, value: Any) -> None:
        """Raises ConfigError if there is no such field, or it can't have this value."""
        cls._known(name)(name, value)

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules to apply, in the order of application."""
        chosen: tuple[str, ...] = FUSION_RULES if self.fusion_rules is None else self.fusion_rules
        if not self.kernel_fusion:
            chosen = ()
        if self.attention_optimization == "eager":
            chosen = tuple(r for r in chosen if r != "attention_softmax")
        return tuple(r for r in FUSION_RULES if r in chosen)

    @property
    def attention(self) -> AttentionMode:
        """Which tokens a token sees. Raises ConfigError where the settings do not go together."""
        asked: str = self.attention_optimization
        if self.sparse_attention:
            if asked not in ("flash", "sparse"):
                raise ConfigError(f"sparse_attention=True and attention_optimization={asked!r}: choose one")
            asked = "sparse"
        if asked not in WINDOWS:
            return AttentionMode()
        window = WINDOWS[asked] if self.attention_window is None else self.attention_window
        return AttentionMode(asked, window, self.attention_sinks, self.attention_budget)  # type: ignore[arg-type]

    def format_of(self, weight: str, natural: str, least: str | None = None) -> str:
        """Name of the format that one weight matrix of an original model is packed in. With a `kl_budget` that is the natural
        one at first: the others are chosen by measuring the model in it.

        Args:
            natural: the one that keeps it as it is.
            least: the smallest that `precision` may make it; one named in `formats` may be smaller.
        """
        if self.kl_budget is not None:
            return natural
        if (named := self.named_format(weight.removesuffix(".weight"))) is not None:
            return named
        if self.precision == "auto":
            return natural
        return self.precision if least is None else larger(self.precision, least)

    def named_format(self, module: str) -> str | None:
        """What `formats` says of a module: by its name, or else by the first pattern that fits it."""
        formats = self.formats or {}
        return formats.get(module) or next((f for entry, f in formats.items() if _fits(entry, module)), None)

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """The entries of `formats` that none of these modules has or fits."""
        return [e for e in self.formats or () if e not in modules and not any(_fits(e, module) for module in modules)]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config of the dict that `to_dict` made, as Transformers reads it from config.json.

        Raises:
            ConfigError: a field is unknown or wrong, or the dict is that of a checkpoint packed by an earlier version.
        """
        if "modules" in config_dict:
            raise ConfigError(
                f"quantization_config.format_version {config_dict.get('format_version')!r}: this checkpoint was packed by an "
                "earlier version, whose layout is not read any more; convert the original again"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON types; `from_dict` reads them back to an equal config."""
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
    """The format with the most bits a weight; the first of equals."""
    return max(formats, key=lambda name: get_format(name).bits)


def _fits(entry: str, module: str) -> bool:
    """Whether an entry of `formats` is a pattern, and this module's name fits it: * stands for any characters."""
    return "*" in entry and re.fullmatch(".*".join(map(re.escape, entry.split("*"))), module) is not None


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)
