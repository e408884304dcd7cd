"""adapter_config.json of a PEFT LoRA adapter: the scale of each module's pair, and a refusal of everything else.

Source: `LoraConfig` of PEFT (https://github.com/huggingface/peft, src/peft/tuners/lora/config.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import AdapterError, shown
from .files import read_json

CONFIG: Final = "adapter_config.json"
MERGE: Final = "merge the adapter into the model (PeftModel.merge_and_unload) and load the result"  # the remedy
_MAX_PATTERNS, _MAX_PATTERN = 4096, 512  # entries of a pattern table, characters of a pattern
_MAX_ALPHA = 1e6
_WITHOUT_EFFECT: Final = frozenset(  # on the result of a trained adapter, or read from the tensors themselves
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
        "target_modules", "task_type",
    }
)  # fmt: skip
_READ: Final = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"})
_NAMES: Final = {
    "use_dora": "DoRA", "modules_to_save": "fully trained modules", "trainable_token_indices": "trained token embeddings",
    "target_parameters": "parameters that are not modules, such as experts", "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activation by tokens (aLoRA)", "use_qalora": "QALoRA", "lora_bias": "a bias in lora_B",
    "fan_in_fan_out": "transposed matrices",
}  # fmt: skip
_CHANGES_BASE: Final = ("pissa", "olora", "loftq", "corda", "lora_ga")  # ways to start training


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter that matter for its result.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: of those that one does: patterns of module paths, the first that matches counts.
        stabilized: the scale is alpha / sqrt(rank) instead of alpha / rank (rsLoRA).
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    stabilized: bool = False

    def rank_of(self, module: str) -> int:
        """Rank of a module's pair."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of a module's product B A."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilized else rank)


def read_lora_config(directory: Path) -> LoraConfig:
    """Reads and checks an adapter's settings.

    Raises:
        CheckpointError: the file is missing or damaged.
        AdapterError: the adapter is of another kind, or has a feature that is not supported.
    """
    config = read_json(directory, CONFIG)

    def refuse(message: str) -> AdapterError:
        return AdapterError(f"{CONFIG}: {message}", path=directory)

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {shown(config.get('peft_type'))}; only LORA adapters can be loaded")
    if config.get("bias", "none") != "none":
        raise refuse(f"bias is {shown(config['bias'])}: trained biases are not supported; {MERGE}")
    for name, value in config.items():
        if name in _WITHOUT_EFFECT or name in _READ or value in (None, False, "", [], {}):
            continue
        what = f" ({_NAMES[name]})" if name in _NAMES else ""
        raise refuse(f"{shown(name)}{what} is {shown(value)}, which is not supported; {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise refuse(
            f"init_lora_weights is {shown(start)}, which changes the model itself; save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    return LoraConfig(
        rank=int(_number(config.get("r"), "r", refuse, whole=True)),
        alpha=_number(config.get("lora_alpha"), "lora_alpha", refuse),
        rank_pattern={k: int(v) for k, v in _patterns(config, "rank_pattern", refuse, whole=True).items()},
        alpha_pattern=_patterns(config, "alpha_pattern", refuse),
        stabilized=config.get("use_rslora") is True,
    )


def _number(value: Any, name: str, refuse: Any, *, whole: bool = False) -> float:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not (1 if whole else 0) <= value <= _MAX_ALPHA:
        raise refuse(
            f"{name} is {shown(value)}, must be {'an integer from 1' if whole else 'a number from 0'} to {_MAX_ALPHA:g}"
        )
    return float(value)


def _patterns(config: Mapping[str, Any], name: str, refuse: Any, *, whole: bool = False) -> dict[str, float]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise refuse(f"{name} must map at most {_MAX_PATTERNS} patterns to numbers")
    for pattern in patterns:
        _check_pattern(pattern, name, refuse)
    return {pattern: _number(value, f"{name}[{shown(pattern)}]", refuse, whole=whole) for pattern, value in patterns.items()}


def _check_pattern(pattern: str, name: str, refuse: Any) -> None:
    """Refuses patterns whose matching may take exponential time: those with repeated groups or many repetitions."""
    repeated = re.findall(r"(?<!\\)[*+{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(repeated) > 2 or re.search(r"\)[*+{?]", pattern):
        raise refuse(f"{name}: the pattern {shown(pattern)} is too complex; write out the names of the modules")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise refuse(f"{name}: {shown(pattern)} is not a valid pattern: {error}") from None


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's `get_pattern_key`: the pattern matches the end of the path, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
