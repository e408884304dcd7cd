"""Binds a model with packed layers to a backend: the model keeps Transformers' own forward and cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...backends.base import DEFAULTS, Backend, CompileOptions
from ...backends.registry import choose_backend
from ...checkpoint import Manifest
from ...checkpoint.manifest import KEY
from ...config import DeepSeekConfig
from ..attention.native_attention import attention_of
from ..attention.registration import use_native_attention
from ..bind.instance_method import Replacement
from ..bind.modules import Packed
from ..bind.packed_model import NoCopyCallable, PackedModel
from ..bind.swap import stored_tensors
from ..model.apply import Apply
from ..model.parameter_count import ParameterCount
from ..model.refuse import Refuse
from ..model.save import PackedSave
from .activations import parallelize_activations
from .feed_forward import FusedFeedForward, fuse_feed_forward
from .first_states import new_cache
from .head import PackedHead, pack_head
from .norms import FusedNorm, fuse_norms
from .report import GeneralReport, make_report
from .residual import fuse_residuals


class GeneralRuntime(PackedModel):
    """`model.dso` of a model on the general path.

    Args:
        model, config, manifest, bytes_before: as in `PackedModel`.
        no_plan: why there is no execution plan.
    """

    def __init__(
        self, model: Any, config: DeepSeekConfig, manifest: Manifest, *, no_plan: str, bytes_before: int | None = None
    ) -> None:
        super().__init__(
            model,
            config,
            manifest,
            methods=type(self).own_methods,
            make_report=type(self).own_report,
            bytes_before=bytes_before,
        )
        self.no_plan = no_plan
        self._packed = _packed_names(model)

    def own_methods(self) -> dict[str, Any]:
        """What is set on the model."""
        generate = {"generate": _Generate(self)} if self.model.can_generate() else {}
        return {
            **generate,
            "forward": _Forward(self),
            "save_pretrained": PackedSave(self),
            "num_parameters": ParameterCount(self),
            "report": self.report,
            "_apply": Apply(self),
            "_replicate_for_data_parallel": Refuse("start one process per device, each with its own model"),
        }

    def own_report(self) -> GeneralReport:
        """The report about the model."""
        return make_report(self)

    def changed(self) -> str | None:
        """How the packed layers differ from those that were bound (an adapter wraps them?); None: they are the same."""
        return None if _packed_names(self.model) == self._packed else "packed layers were replaced or wrapped"

    def _product(self, backend: Backend) -> Callable[..., Any]:
        options = self._options(backend)
        return backend.linear if options == DEFAULTS else partial(backend.linear, options=options)

    def _options(self, backend: Backend) -> CompileOptions:
        activation = self.config.activation
        return CompileOptions(activation) if activation in backend.capabilities.activations else DEFAULTS

    def feed_forward(self, backend: Backend) -> Callable[..., Any] | None:
        """The backend's function for `FusedFeedForward`; None: Transformers' forward is as fast."""
        if not backend.capabilities.dense_operations:
            return None
        return partial(backend.feed_forward, options=self._options(backend))

    def norm(self, backend: Backend) -> Callable[..., Any] | None:
        """The backend's function for `FusedNorm`; None: torch's is as fast."""
        return backend.norm if backend.capabilities.dense_operations else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for Transformers' forward: torch's threads do not compete with those of the backend, which computes
        attention."""
        backend = self.backend
        with backend.thread_context(), attention_of(backend, self._options(backend)):
            yield

    def _set_products(self, backend: Backend) -> None:
        super()._set_products(backend)
        fused, norm = self.feed_forward(backend), self.norm(backend)
        for module in self.model.modules():
            if isinstance(module, PackedHead):
                module.product = NoCopyCallable(self._product(backend))
            elif isinstance(module, FusedFeedForward):
                module.fused = None if fused is None else NoCopyCallable(fused)
            elif isinstance(module, FusedNorm):
                module.fused = None if norm is None else NoCopyCallable(norm)

    def move(self) -> None:
        """Call after the model moved to another device: chooses a backend for it."""
        self._backend = None
        _ = self.backend

    def rebind(self) -> None:
        """Does nothing: products read the modules' current storage."""


def _packed_names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Packed)]


class _Threads(Replacement):
    """Runs the class's method in the runtime's context."""

    runtime: Any  # a GeneralRuntime

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.runtime.running():
            return self._original(self.runtime.model, *args, **kwargs)


class _Forward(_Threads):
    replaces = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.runtime.model
        cache = next((name for name in ("cache", "past_key_values") if name in self._order), None)
        if cache is not None and model.config.is_encoder_decoder and not model.training and model.device.type == "cpu":
            given = self.named(args, kwargs)
            # Pairs of two models have no such field: each of the two has its own.
            uses = getattr(model.config, "use_cache", False) if given.get("use_cache") is None else given["use_cache"]
            # With labels, most models create no cache, and their result would have one more part.
            if uses and all(given.get(name) is None for name in ("cache", "past_key_values", "labels")):
                kwargs = {name: value for name, value in given.items() if name not in ("cache", "past_key_values")}
                args, kwargs[cache] = (), new_cache(model.get_decoder().config)
        return super().__call__(*args, **kwargs)


class _Generate(_Threads):
    replaces = "generate"


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook: makes the input contiguous. For a strided one (the last token of each row) and a frozen weight, torch expands the
    weight to one copy per row."""
    return tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in args)


def bind(
    model: Any,
    config: DeepSeekConfig,
    no_plan: str,
    *,
    bytes_before: int | None = None,
    notes: list[str] | None = None,
    kind: type[GeneralRuntime] = GeneralRuntime,
) -> Any:
    """Binds a model with loaded packed layers to the backend of the settings.

    Args:
        model: the model.
        config: the settings; the model gets a copy.
        no_plan: why there is no execution plan, for the report and errors.
        bytes_before: size of the model before it was packed, for the report.
        notes: warnings from loading.
        kind: class of the runtime.

    Returns: the same model, with the attribute `dso` and a few methods of its own. The base model's parameters are frozen; a
    head that is outside it can be trained.
    """
    config = copy.deepcopy(config)
    pack_head(model, config, choose_backend(config, model.device)[0].pack)
    runtime = kind(model, config, Manifest.of(stored_tensors(model)), no_plan=no_plan, bytes_before=bytes_before)
    model.config.quantization_config = config
    setattr(model.config, KEY, runtime.manifest.to_dict())
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.quantization_config = copy.deepcopy(config)
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    if type(head := model.get_output_embeddings()) is nn.Linear:
        head.register_forward_pre_hook(_contiguous)
    for note in notes or ():
        runtime.warn_once(note)
    runtime.attach(model)
    model._weight_conversions = []  # packed tensors are saved unchanged
    backend = runtime.backend  # is created now, and sets the layers' products
    if kind is GeneralRuntime:  # the modules of the others belong to a plan, and their own forward is for what it cannot serve
        fuse_feed_forward(model, runtime.feed_forward(backend))
        fuse_norms(model, runtime.norm(backend))
        fuse_residuals(model)
    parallelize_activations(model, backend.threads)
    if backend.capabilities.dense_operations:
        use_native_attention(model)
    return model
