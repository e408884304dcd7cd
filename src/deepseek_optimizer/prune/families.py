"""What can be left out of each family's models, which tensors that cuts, and which config fields count it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ..errors import UnsupportedModelError

MLP, HEADS, EXPERTS = "mlp", "heads", "experts"


@dataclass(frozen=True)
class Width:
    """Units that every layer has the same number of, such as the channels of an MLP, and that can be left out one by one.

    Attributes:
        kind: MLP, HEADS or EXPERTS.
        units: the config field with their number.
        scaled: further fields, which shrink in proportion.
        cuts: pattern of a tensor's name within its layer -> the axis along which the units lie one after the other, each of
            the same size.
        reader: within a layer, the module whose input or use tells the importance of a unit.
    """

    kind: str
    units: str
    scaled: tuple[str, ...]
    cuts: Mapping[str, int]
    reader: str


_MLP: Final = Width(
    MLP, "intermediate_size", (), {r"mlp\.(gate|up)_proj\.(weight|bias)": 0, r"mlp\.down_proj\.weight": 1}, "mlp.down_proj"
)
# Query heads that share a key head lie one after the other, so that a group of them is one unit.
_GROUPED: Final = Width(
    HEADS,
    "num_key_value_heads",
    ("num_attention_heads",),
    {r"self_attn\.[qkv]_proj\.(weight|bias)": 0, r"self_attn\.o_proj\.weight": 1},
    "self_attn.o_proj",
)
_LATENT: Final = Width(
    HEADS,
    "num_attention_heads",
    ("num_key_value_heads",),
    {r"self_attn\.(q_proj|q_b_proj|kv_b_proj)\.weight": 0, r"self_attn\.o_proj\.weight": 1},
    "self_attn.o_proj",
)


def _experts(units: str) -> Width:
    router = r"mlp\.gate\.(weight|e_score_correction_bias)"
    return Width(EXPERTS, units, (), {router: 0, r"mlp\.experts\.(gate_up|down)_proj": 0}, "mlp.experts")


FAMILIES: Final[Mapping[str, Sequence[Width]]] = MappingProxyType({
    "llama": (_MLP, _GROUPED),
    "qwen2": (_MLP, _GROUPED),
    "qwen3": (_MLP, _GROUPED),
    "mistral": (_MLP, _GROUPED),
    "smollm3": (_MLP, _GROUPED),
    "mixtral": (_GROUPED, _experts("num_local_experts")),
    "deepseek_v3": (_LATENT, _experts("n_routed_experts")),
})  # fmt: skip


def width_of(model_type: Any, kind: str) -> Width:
    """What `kind` means in a family.

    Raises:
        UnsupportedModelError: the family, or this kind in it, cannot be pruned.
    """
    found = next((width for width in widths_of(model_type) if width.kind == kind), None)
    if found is None:
        kinds = ", ".join(["depth", *(width.kind for width in FAMILIES[model_type])])
        raise UnsupportedModelError(f"{kind}: cannot be pruned in models of type {model_type}; possible are {kinds}")
    return found


def widths_of(model_type: Any) -> Sequence[Width]:
    """All that can be left out of the layers of a family. Raises UnsupportedModelError for a family that cannot be pruned."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"models of type {model_type} cannot be pruned; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
