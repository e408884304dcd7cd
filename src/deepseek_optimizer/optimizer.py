"""`load_model` and `DynamicGraphOptimizer`: the two ways to an optimised model beside `from_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .config import DeepSeekConfig
from .errors import ConfigError


def load_model(path: str | os.PathLike[str], config: DeepSeekConfig | None = None, **fields: Any) -> Any:
    """Loads a checkpoint as an optimised Transformers model, on the CPU, ready to generate.

    Weights are packed as they stream in: beside the packed model, memory for a panel of rows is all it takes. Those of a packed
    checkpoint are mapped from its file instead: as long as the model lives, that file may be replaced (`save_pretrained` and
    `dso convert` do), and the model goes on with what it loaded. Where it is written into or cut short, every later call
    raises CheckpointChangedError.

    Args:
        path: a directory as `save_pretrained` writes it (float or packed), a .gguf file, or a hub name.
        config: what to optimise; None: everything, weights kept without loss.
        fields: single fields of `DeepSeekConfig`, over those of `config`.

    Returns:
        The family's `ForCausalLM` model, in eval mode; `model.report()` says what was made of it. Load other classes
        (`AutoModel`, classifiers) with their own `from_pretrained(path, quantization_config=config)`.

    Raises:
        CheckpointError: a file is damaged, incomplete or not what it claims. Names file and tensor; no pickle is ever opened.
        CheckpointChangedError: a file was written to while it was read.
        ConfigError: a field, or the checkpoint's config.json, is wrong or names what is not supported.
        NotEnoughMemoryError: the weights do not fit in what is free; before any is read.
    """
    from .integration.load.loader import load

    return load(path, config, fields)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint that `load_model` takes, checked against the size of the embedding.

    Raises:
        CheckpointError: there is none, or it is wrong.
        ConfigError: the checkpoint's config.json is wrong; Transformers reads it too, and would blame the tokenizer.
    """
    from .checkpoint import load_tokenizer as load
    from .checkpoint import open_checkpoint
    from .integration.configs import check_config
    from .integration.load.resolve import resolve

    with open_checkpoint(resolve(path)) as checkpoint:
        check_config(checkpoint.config())
        return load(checkpoint)


def report(model: Any) -> Any:
    """What was made of an optimised model: prints as a table, `.to_dict()` for programs."""
    from .integration.bind.runtime import runtime_of

    return runtime_of(model).report()


class DynamicGraphOptimizer:
    """Optimises a model that is already loaded, in place.

    Args:
        model: a Transformers model of a known family, float, or optimised before (then only rules and ranges change).
        fusion_rules: names of the rules to apply; None: those of `config`.
        batch_size_range: (smallest, largest) batch that buffers are sized and kernels warmed for; None: that of `config`.
        config: what to optimise; None: the weights keep their dtype.

    Raises:
        ConfigError, UnsupportedModelError: at construction, before anything is changed.
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

        if config is not None and not isinstance(config, DeepSeekConfig):
            raise ConfigError(f"config must be a DeepSeekConfig or None, got {type(config).__name__}")
        given = {"fusion_rules": fusion_rules, "batch_size_range": batch_size_range}
        fields = {} if config is None else config.to_dict()
        self.config = DeepSeekConfig(**{**fields, **{name: value for name, value in given.items() if value is not None}})
        if getattr(model, "hf_quantizer", None) is not None and "dso" not in model.__dict__:
            raise ConfigError("the model is quantised by another method; load the original")
        earlier = getattr(model, "__dict__", {}).get("dso")
        chosen_for = earlier.config.kl_budget if earlier is not None else None
        if self.config.kl_budget not in (None, chosen_for):
            raise ConfigError("kl_budget needs the model's tokenizer and calibration text; use load_model or `dso convert`")
        if self.config.calibration is not None:
            raise ConfigError("calibration needs the model's files and tokenizer; use load_model or `dso convert`")
        if not hasattr(model, "config"):
            raise ConfigError(f"expected a Transformers model, got {type(model).__name__}")
        plan_graph(model.config, self.config.rules, mode=self.config.attention)
        extended(model.config, self.config)
        if (dtype := getattr(model, "dtype", None)) not in NATURAL:
            raise ConfigError(f"a model of dtype {dtype} cannot be packed; use model.float() or model.bfloat16() first")
        if model.device.type == "meta":
            raise ConfigError("the model is on the meta device: it has no weights yet; load them first")
        self.model = model

    def optimize(self) -> Any:
        """Packs the weights module by module, giving back the originals' memory as it goes, and puts the plan in charge.

        Returns: the model that was given.
        """
        from .integration.load.convert import optimize_in_place

        optimize_in_place(self.model, self.config)
        return self.model

    def report(self) -> Any:
        """Which rules fired where, kernels, ISA, formats, bytes before and after. Only after `optimize()`."""
        return report(self.model)
