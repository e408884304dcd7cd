"""Binds an execution plan to a Transformers model: sets methods on the model instance in place of its class's.

Classes and Transformers itself are unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from ...backends.base import Backend
from ...checkpoint.manifest import KEY, Manifest
from ...config import DeepSeekConfig
from ..bind.graphs import planned_module, whole_graph
from ..bind.instance_method import InstanceMethod
from ..bind.runtime import Runtime
from ..bind.swap import matrices_of
from ..generation.generate import PlanGenerate
from ..generation.special_tokens import special_token_notes
from .adapters import ModuleWalk, OutputEmbeddings
from .apply import Apply
from .decoder_forward import DecoderForward
from .forward import PlanForward
from .outer_model import OuterModel
from .parameter_count import ParameterCount
from .refuse import DIVIDED, RESIZE, Refuse
from .report import make_report
from .resize import ResizeTokens
from .save import PackedSave


def bind(
    model: Any,
    config: DeepSeekConfig,
    *,
    earlier: Manifest | None = None,
    bytes_before: int | None = None,
    notes: list[str] | None = None,
    backend: Backend | None = None,
) -> Any:
    """Compiles a plan for a model with packed modules and binds it to this instance. If the model has another head than the
    family's language model head, the plan is bound to its decoder; the head stays a float module and can be trained.

    Args:
        model: the model.
        config: the settings; the model gets a copy.
        earlier: a manifest that says how the formats were chosen and the weights rounded.
        bytes_before: size of the model before it was packed, for the report.
        notes: warnings from loading.
        backend: that was created for this model; None: the one that the settings choose.

    Returns: the same model, with the attribute `dso` and the methods of `instance_methods`.
    """
    config = copy.deepcopy(config)
    planned = planned_module(model)
    notes = [*(notes or ()), *special_token_notes(model)]
    runtime = Runtime(
        planned,
        config,
        _manifest(model, *((earlier.curve, earlier.rounding) if earlier is not None else ((), {}))),
        methods=instance_methods,
        make_report=make_report,
        bytes_before=bytes_before,
        notes=notes,
    )
    if backend is not None:
        runtime.use(backend)
    describe(model, config, runtime.manifest)
    for parameter in planned.parameters():
        parameter.requires_grad_(False)
    if "dso" not in planned.__dict__:
        planned.register_load_state_dict_post_hook(_rebind)
    runtime.attach(planned)
    if planned is not model:
        OuterModel(model, runtime)
    parts: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        part._weight_conversions = []  # packed experts are saved unchanged; Transformers would split them
    _ = runtime.plan  # compiled now, so that errors are raised at load time
    return model


def rebind(model: Any, curve: Sequence[Mapping[str, Any]] = (), rounding: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Recompiles the plan after packed modules were replaced by others. `curve`, `rounding`: of `Manifest`."""
    runtime: Runtime = model.dso
    runtime.replaced()
    runtime.manifest = _manifest(model, curve, rounding)
    describe(model, runtime.config, runtime.manifest)
    _ = runtime.plan


def _manifest(model: Any, curve: Sequence[Mapping[str, Any]], rounding: Mapping[str, Any]) -> Manifest:
    return Manifest.of(matrices_of(model, whole_graph(model)), curve, rounding)


def describe(model: Any, config: DeepSeekConfig, manifest: Manifest) -> None:
    """Stores the settings and the manifest in the model's config; the model's quantizer gets a copy of the settings."""
    model.config.quantization_config = config
    setattr(model.config, KEY, manifest.to_dict())
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.quantization_config = copy.deepcopy(config)


def instance_methods(runtime: Runtime) -> dict[str, Any]:
    """The methods to set on an optimized model, by name; they replace or extend those of its class."""
    served: dict[str, Any] = {"forward": DecoderForward(runtime)}
    if runtime.graph.has_head:
        served = {
            "forward": PlanForward(runtime),
            "generate": PlanGenerate(runtime),
            "get_output_embeddings": OutputEmbeddings(runtime),
        }
    divided = Refuse(DIVIDED) if runtime.config.parallel.ranks > 1 else None
    resize = ResizeTokens(runtime, bind) if runtime.graph.has_head else Refuse(RESIZE)
    return {
        **served,
        "named_modules": ModuleWalk(runtime),
        "save_pretrained": divided or PackedSave(runtime),
        "resize_token_embeddings": divided or resize,
        "num_parameters": ParameterCount(runtime),
        "report": runtime.report,
        "_apply": divided or Apply(runtime),
        "compile": _Compile(runtime),
        "_replicate_for_data_parallel": Refuse("start one process per device, each with its own model"),
    }


def _rebind(module: Any, keys: Any) -> None:
    """Called after `load_state_dict`: a plan holds copies of norms, and `assign=True` replaces the storage."""
    runtime = module.__dict__.get("dso")
    if runtime is not None:
        runtime.rebind()


class _Compile(InstanceMethod):
    """`model.compile`: does nothing, with a warning. (`torch.compile(model)` cannot be distinguished from a plain call.)"""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.runtime.warn_once("torch.compile has no effect: the plan of an optimized model is already compiled")
