"""The Transformers quantizer behind `from_pretrained(..., quantization_config=DeepSeekConfig(...))`.

Linear, embedding and experts modules are replaced on the meta device, weights are packed one by one as Transformers reads them,
and after loading a plan is bound to the model. A packed checkpoint is loaded in the same way, without packing. A model without
a plan takes the general path: only its linear layers are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer

from ...backends.registry import choose_backend, runs_on
from ...checkpoint import (
    Checkpoint,
    Manifest,
    PackedCheckpoint,
    QuantizedCheckpoint,
    check_tensors,
    check_tokenizer_beside,
    load_tokenizer,
    open_checkpoint,
)
from ...checkpoint.directory import CONFIG, INDEX, SINGLE
from ...checkpoint.manifest import KEY
from ...config import DeepSeekConfig
from ...errors import CheckpointError, ConfigError
from ...graph.min_formats import fp32_weights
from ...quant import QUANT_METHOD, PackedStack, PackedWeight
from ...system.backend_entries import AUTO
from ...system.cuda_device import why_no_cuda
from .. import encoder, general, multimodal
from ..attention.registration import check_attention_name
from ..bind.classes import check_class, renamed_for, stored_as
from ..bind.context_extension import extended
from ..bind.graphs import has_head, plan_graph, whole_graph
from ..bind.modules import Packed
from ..bind.runnable import check_runnable
from ..bind.swap import expected_tensors, float_shape, order_columns, swap_on_meta
from ..memory.weights import check_memory
from ..model.bind_plan import bind
from .calibrate import Calibration, calibrate, calibration_for, without_rounding
from .kl_budget import adapt, calibration_tokens
from .mapped import MappedFiles
from .mtp_layers import add_mtp_layers, ignored_keys, own_tensors, renamings, stored_mtp_layers
from .pack_op import PackWeight, unmerged
from .placement import device_of, packing_backend
from .ranks import check_undivided
from .resolve import resolve

_QUANTIZED = (
    "from_pretrained would read quantized weights without their scales; use load_model(path, config) with the same config"
)


class PackingQuantizer(HfQuantizer):
    """Packs a model while Transformers loads it. Registered under "deepseek_optimizer" by `register`.

    Args:
        quantization_config: the settings.
        kwargs: as in `HfQuantizer`.
    """

    quantization_config: DeepSeekConfig

    def __init__(self, quantization_config: DeepSeekConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.refused: list[CheckpointError] = []  # errors in parameters, raised after loading
        self.manifest: Manifest | None = None  # of a packed checkpoint
        self.no_plan: str | None = None  # why the model takes the general path
        self.multimodal = False  # whether its language model has a plan nevertheless
        self.packs_experts = True
        self.calibration: Calibration | None = None  # what the weights are rounded on after loading
        self.notes: list[str] = []
        self.settings = self.quantization_config  # while loading, `quantization_config` is without that rounding

    @property
    def chooses_formats(self) -> bool:
        """Whether formats have to be chosen for a `kl_budget`."""
        return self.quantization_config.kl_budget is not None and not self.pre_quantized

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained` only."""
        check_undivided(self.quantization_config)
        self.packer = packing_backend(self.quantization_config).pack

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype {dtype} cannot be packed; use float32 or bfloat16")
        return torch.float32 if self.quantization_config.precision == "fp32" else dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Checks the config before a model is created from it, and a directory's files before Transformers opens any (a pickle,
        an index that refers outside the directory). This is the first hook that gets the config."""
        check_attention_name(config, self.quantization_config)
        self.no_plan = general.why_general(config, self.quantization_config.strict)
        if self.no_plan is None:
            plan_graph(config, (), mode=self.quantization_config.attention)
            config = extended(config, self.quantization_config)
        else:
            self.multimodal = multimodal.why_no_language_plan(config) is None
            general.check_settings(self.quantization_config, self.no_plan, language=self.multimodal)
        folder = Path(config.name_or_path)
        if config.name_or_path and folder.is_dir():
            standard = any((folder / name).is_file() for name in (SINGLE, INDEX))
            if standard or (any(folder.glob("*.bin")) and not any(folder.rglob("*.safetensors"))):
                with open_checkpoint(folder) as checkpoint:
                    if isinstance(checkpoint, QuantizedCheckpoint):
                        raise ConfigError(f"{folder}: {_QUANTIZED}")
        return config

    def update_device_map(self, device_map: Any) -> Any:
        """Chooses a single device: a plan cannot span several. Without a device map, it is one that the backend can run on.

        Raises:
            ConfigError: several devices are named, or one that is not available.
            BackendError: the backend cannot run there.
        """
        if device_map is None and device_of(self.quantization_config.backend) != "cpu":
            device_map = {"": device_of(self.quantization_config.backend)}
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            backend = self.quantization_config.backend
            gpu = torch.cuda.is_available() and runs_on(backend, "cuda")
            device_map = {"": "cuda:0" if gpu else "cpu" if runs_on(backend, "cpu") else device_of(backend)}
        if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
            raise ConfigError(f"device_map must name one device for an optimized model, got {device_map}")
        named = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map)}
        on_cuda = [name for name in named if name.isdigit() or name.startswith("cuda")]
        if on_cuda and (reason := why_no_cuda()) is not None:
            raise ConfigError(
                f'device_map {device_map} names a CUDA device, but none is available; use device_map="cpu". {reason}'
            )
        if on_cuda and self.quantization_config.backend != AUTO:
            name = on_cuda[0]
            choose_backend(self.quantization_config, torch.device(f"cuda:{name}" if name.isdigit() else name))
        return device_map

    def get_new_dtype(self, *args: Any, **kwargs: Any) -> Any:
        """Called for weights that are already packed, after Transformers has mapped the files and before it reads them."""
        self.mapped.watch()
        return super().get_new_dtype(*args, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Called for weights that are to be packed, at the same time as `get_new_dtype`."""
        self.mapped.watch()
        path, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(path)
        return isinstance(module, Packed) and leaf in module.held()

    def get_quantize_ops(self) -> Any:
        return PackWeight(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Passes experts to `PackWeight` one by one, as stored. If merged first, as Transformers does, the experts of a layer
        would be in memory three times."""
        if self.pre_quantized or not self.packs_experts:
            return weight_conversions
        more = renamings(model.config) if self.no_plan is None and model is not None else []
        return [*(unmerged(conversion) for conversion in weight_conversions), *more]

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or model.dtype
        if self.no_plan is not None:
            return self._prepare_general(model, checkpoint_files, dtype, kwargs.get("device_map"))
        if self.chooses_formats and not has_head(model):
            raise ConfigError(
                f"kl_budget measures logits, but {type(model).__name__} has none; choose formats with load_model or "
                "`dso convert`, and load the packed directory with this class"
            )
        self._add_mtp_layers(model, checkpoint_files, dtype)
        if self.pre_quantized:
            manifest = _language_manifest(model, checkpoint_files)
            self.quantization_config, self.manifest = renamed_for(model, self.quantization_config, manifest)
        graph = whole_graph(model)
        packed = self.manifest.formats() if self.manifest is not None else None
        swap_on_meta(model, graph, self.quantization_config, dtype, packed=packed)
        if self.manifest is not None:
            order_columns(model, self.manifest.column_order)
        if not self.pre_quantized and has_head(model) and _is_standard(checkpoint_files):
            self.calibration, self.notes = self._calibration(model, Path(checkpoint_files[0]).parent)
        if self.calibration is not None:
            self.quantization_config = DeepSeekConfig(**without_rounding(self.settings))
            swap_on_meta(model, graph, self.quantization_config, dtype)
        self._check_device(model, kwargs.get("device_map"))
        _expect_fp32(model, fp32_weights(graph))
        _check_files(checkpoint_files, model)
        self.files, self.mapped = checkpoint_files, MappedFiles(checkpoint_files or ())
        if not self.pre_quantized:
            _expect_floats(model, dtype)
        if self.chooses_formats:
            self.texts = self._calibration_tokens(model.config)
        return model

    def _prepare_general(self, model: Any, files: Any, dtype: torch.dtype, device_map: Any) -> Any:
        """`_process_model_before_weight_loading` on the general path."""
        self.files, self.mapped = files, MappedFiles(files or ())
        _refuse_pickles(files)
        self.bytes_before = sum(p.nbytes for p in model.parameters())
        self.multimodal = self.multimodal and multimodal.is_whole(model)
        general.check_settings(self.quantization_config, self.no_plan or "", language=self.multimodal)
        self.packs_experts = self.multimodal or general.packs_experts(model)
        if self.pre_quantized:
            manifest = Manifest.read(vars(model.config), Path(model.config.name_or_path) / CONFIG)
            self.manifest = general.renamed_for(model, manifest)
        kind = multimodal if self.multimodal else general
        kind.swap_on_meta(model, self.quantization_config, dtype, self.manifest.formats() if self.manifest else None)
        if self.manifest is not None:
            order_columns(model, self.manifest.column_order)
        if _is_standard(files):
            with open_checkpoint(Path(files[0]).parent) as checkpoint:
                check_tokenizer_beside(checkpoint)
        if not self.pre_quantized:
            if device_map is None or set(map(str, device_map.values())) == {"cpu"}:
                check_memory([*model.parameters(), *model.buffers()])
            elif (device := _only_device(device_map)).type != "cpu":
                check_memory([*model.parameters(), *model.buffers()], device, self.quantization_config.kv_cache_memory)
            _expect_floats(model, dtype)
        return model

    def _check_device(self, model: Any, device_map: Any) -> None:
        """Raises BackendError or NotEnoughMemoryError if a model with a plan cannot run on its device, or does not fit."""
        device = _only_device(device_map)
        check_runnable(model, self.quantization_config, device)
        if device.type != "cpu":
            if self.quantization_config.cpu_expert_layers:
                raise ConfigError(
                    f"cpu_expert_layers={self.quantization_config.cpu_expert_layers}: from_pretrained puts all weights on one "
                    "device; use load_model with device=..., or load the model on the CPU and move it with model.to('cuda')"
                )
            held = (*model.parameters(), *model.buffers())
            check_memory(held, device, self.quantization_config.kv_cache_memory)

    def _add_mtp_layers(self, model: Any, files: Any, dtype: torch.dtype) -> None:
        """Adds the MTP layers of a checkpoint, if this package's reader supports its files."""
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored_keys(
            model.config
        )
        if self.quantization_config.mtp == "auto" and has_head(model) and _is_standard(files):
            with torch.device("cpu"), open_checkpoint(Path(files[0]).parent) as checkpoint:
                add_mtp_layers(model, own_tensors(checkpoint, model.config), dtype)

    def _calibration(self, model: Any, folder: Path) -> tuple[Calibration | None, list[str]]:
        with torch.device("cpu"), open_checkpoint(folder) as checkpoint:
            return calibration_for(checkpoint, self.settings, *expected_tensors(model), model.config.max_position_embeddings)

    def _calibration_tokens(self, config: Any) -> list[torch.Tensor]:
        with (
            torch.device("cpu"),
            open_checkpoint(resolve(config.name_or_path)) as checkpoint,
        ):  # otherwise tensors would be on the meta device
            tokenizer = load_tokenizer(checkpoint)
            return calibration_tokens(self.quantization_config, tokenizer, config.max_position_embeddings)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.refused:
            raise self.refused[0]
        for name, module in model.named_modules():
            for leaf, parameter in module._parameters.items() if isinstance(module, Packed) else ():
                if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(
                        "is missing from the checkpoint", file=model.config.name_or_path, tensor=f"{name}.{leaf}"
                    )
        mappings = self._leave_mappings(model)
        held = (*model.named_parameters(), *model.named_buffers())
        for name in (name for name, value in held if value.is_floating_point() and not _is_valid(value)):
            raise CheckpointError(
                "contains NaN or infinite weights; download the file again", file=model.config.name_or_path, tensor=name
            )
        if not self.pre_quantized:
            self.mapped.release_pages()
        mark_quantized(model, self.quantization_config)
        if self.no_plan is not None:
            kind = multimodal if self.multimodal else encoder
            kind.bind(model, self.quantization_config, self.no_plan, bytes_before=self.bytes_before)
            model.dso.mappings.update(mappings)
            return model
        bind(model, self.quantization_config, earlier=self.manifest, notes=self.notes)
        model.dso.mappings.update(mappings)
        if self.calibration is not None:
            calibrate(model, self.settings, self.calibration)
            self.quantization_config = self.settings
        if self.chooses_formats:
            adapt(model, self.texts)
        return model

    def _leave_mappings(self, model: Any) -> list[Any]:
        """Copies tensors out of Transformers' mappings of the files into memory; packed ones are mapped again by this package's
        reader, which detects changes of the files while they are in use.

        Returns: the new mappings.

        Raises:
            CheckpointChangedError: a file was modified meanwhile.
        """
        self.mapped.watch()
        packed = [pair for pair in model.named_modules() if isinstance(pair[1], Packed)]
        mappings: list[Any] = []
        with ExitStack() as opened, torch.no_grad():
            if self.pre_quantized and _is_standard(self.files):
                whole = self.no_plan is not None
                checkpoint = opened.enter_context(open_checkpoint(Path(self.files[0]).parent, whole))
                backend = packing_backend(self.quantization_config)
                checkpoint.mapper = backend.map_file if backend.maps_files else None
                stored = (stored_as if self.no_plan is None else general.stored_as)(checkpoint.tensors, model)
                for path, module in packed:
                    for leaf, weight in module.held().items():
                        if self.mapped.holds(weight.data):
                            module._parameters[leaf].data = _read_again(checkpoint, stored(f"{path}.{leaf}"), weight).data
                mappings = checkpoint.mappings()
            for tensor in (*model.parameters(), *model.buffers()):
                if self.mapped.holds(tensor):
                    tensor.data = tensor.data.clone()
            self.mapped.check()
        self.mapped.unwatch()
        return mappings

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True for adapters; the packed weights themselves are frozen."""
        return True


def _only_device(device_map: Any) -> torch.device:
    """The device of a map from `update_device_map`; None: the CPU."""
    named = next(iter(device_map.values())) if isinstance(device_map, dict) else device_map
    device = torch.device("cuda", named) if isinstance(named, int) else torch.device(named or "cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _read_again(checkpoint: Checkpoint, name: str, weight: PackedWeight) -> PackedWeight:
    if isinstance(weight, PackedStack):
        return checkpoint.packed_stack(name, weight.format, weight.shape)
    return checkpoint.packed(name, weight.format)


def _is_valid(value: torch.Tensor) -> bool:
    """Whether a parameter or buffer may have this value. Scalars are limits (Gemma 4's clipped products); may be infinite."""
    return bool((value.isfinite() if value.dim() else ~value.isnan()).all())


def _expect_floats(model: Any, dtype: torch.dtype) -> None:
    """Sets float placeholders for the weights: Transformers before 5.24 casts weights to the placeholder's dtype."""
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, weight in module.held().items() if isinstance(module, Packed) else ():
            shape = float_shape(leaf, weight, module.layout)
            empty = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
            setattr(module, leaf, placeholders.setdefault(id(module._parameters[leaf]), empty))


def _expect_fp32(model: Any, names: Iterable[str]) -> None:
    """Makes these parameters float32: Transformers before 5.24 creates routers in the model's dtype, which would round them."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(module._parameters[leaf].float(), requires_grad=False))


def _check_files(files: Any, model: Any) -> None:
    """Checks headers, indexes, names and shapes with this package's reader before Transformers allocates memory."""
    _refuse_pickles(files)
    if not _is_standard(files):
        return
    with open_checkpoint(Path(files[0]).parent) as checkpoint:
        check_tokenizer_beside(checkpoint)
        check_class(checkpoint, model)
        formats, shapes = expected_tensors(model)
        # Heads of other kinds may be missing: Transformers initializes them with a warning.
        checked = list(formats) if has_head(model) else whole_graph(model).weights()
        here = stored_as(checkpoint.tensors, model)
        formats, shapes = {here(n): formats[n] for n in checked}, {here(n): shapes[n] for n in checked}
        if any(name in checkpoint.tensors for name in formats):  # otherwise Transformers may be able to convert the names
            check_tensors(checkpoint, formats, shapes, ignored=(".*",))  # Transformers reports extra tensors
            stored_mtp_layers(checkpoint, model.config)


def _refuse_pickles(files: Any) -> None:
    names = {Path(file).name for file in files or ()}
    if pickled := sorted(name for name in names if not name.endswith(".safetensors")):
        raise CheckpointError(
            "is a pickle, which can run code when it is opened; convert it to safetensors if you trust its source",
            file=pickled[0],
        )


def _language_manifest(model: Any, files: Any) -> Manifest:
    """The manifest of the packed checkpoint that a causal language model is loaded from. If the checkpoint also has a vision
    tower, Transformers creates the model from its `text_config`, and the manifest is beside that, with names of the whole."""
    if getattr(model.config, KEY, None) is None and _is_standard(files):
        with open_checkpoint(Path(files[0]).parent) as checkpoint:
            if isinstance(checkpoint, PackedCheckpoint) and checkpoint.whole is not None:
                return checkpoint.manifest
    return Manifest.read(vars(model.config), Path(model.config.name_or_path) / CONFIG)


def _is_standard(files: Any) -> bool:
    """Whether these are checkpoint files with the names that this package's reader expects."""
    names = {Path(file).name for file in files or ()}
    return bool(names) and (names == {"model.safetensors"} or all(name.startswith("model-") for name in names))


def mark_quantized(model: Any, config: DeepSeekConfig) -> None:
    """Sets the attributes that Transformers sets on a model that it loads with a quantizer."""
    model.config.quantization_config = config
    model.hf_quantizer = PackingQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config._is_quantized = True


def register() -> None:
    """Registers `DeepSeekConfig` and `PackingQuantizer` with Transformers; repeated calls are harmless."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(DeepSeekConfig)
        register_quantizer(QUANT_METHOD)(PackingQuantizer)
