"""AutoRound in the packing of GPTQ or AWQ, which `packing_format` names. Source: AutoRound (`export/export_to_autoround/`)."""

from __future__ import annotations

from .awq import awq_layers
from .gptq import gptq_layers
from .matrix import QuantizedMatrix
from .section import Section
from .tensors import StoredTensors
from .words import BITS

_GPTQ, _AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"
_FIELDS = (
    "bits", "group_size", "sym", "data_type", "packing_format", "backend", "extra_config",
    # How the codes were found, and how they are to be run: nothing that changes what is stored.
    "amp", "autoround_version", "batch_size", "block_name_to_quantize", "dataset", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr",
    "minmax_lr", "nblocks", "nsamples", "quant_block_list", "quant_lm_head", "sampler", "scale_dtype", "seed", "seqlen",
    "super_bits", "super_group_size", "supported_types", "to_quant_block_names", "train_bs",
)  # fmt: skip


def find_auto_round(section: Section, tensors: StoredTensors) -> dict[str, QuantizedMatrix]:
    """The quantized layers of a checkpoint, by the name of their weight."""
    section.check_known(_FIELDS)
    bits = section.one_of("bits", BITS)
    size = section.group_size()
    section.one_of("data_type", ("int",), "int")
    per_layer = bool(section.fields.get("extra_config"))
    if section.one_of("packing_format", (_GPTQ, _AWQ)) == _AWQ:
        return awq_layers(tensors, size)
    return gptq_layers(tensors, bits, size, section.flag("sym", True), True, per_layer)
