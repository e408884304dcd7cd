"""Low-rank adapters (LoRA): what they add to the products of a model.

The matrices belong to an adapter, not to the graph: a step names the adapter of each sequence.
"""

from __future__ import annotations

from ..ir import AdapterSite, Graph, Node
from .spec import INT, NAME, Attr, Operand, OpSpec, step_attr

_SITE = Attr("site", INT, "index of the product in `Graph.adapter_sites`", step_field="index")
_RANK = step_attr("rank", INT, "largest rank R of an adapter")
_HEADS = (  # set by lowering, for sites of latent attention
    step_attr("heads", INT, "the product is one per head; 0: one for whole rows", 0),
    step_attr("head_dim", INT, "with heads, elements of a head in x, or y", 0),
    Attr("elements", INT, "with heads, how many of them, the first, are multiplied, or added to", 0, step_field="nope"),
)
_SOURCE = "Source: Hu et al. 2021, LoRA; many adapters in one step: Chen et al. 2023, Punica."
_BESIDE = Attr("beside", NAME, "set by lowering: a weight of the product that adds h, in whose kind of rows x is read", None)


def _site(node: Node, graph: Graph) -> AdapterSite | None:
    index = node.attrs["site"]
    return graph.adapter_sites[index] if 0 <= index < len(graph.adapter_sites) else None


def _down_fits(node: Node, graph: Graph) -> bool:
    site = _site(node, graph)
    return site is not None and (node.inputs[0].width, node.outputs[0].width) == (site.inputs, node.attrs["rank"])


def _up_fits(node: Node, graph: Graph) -> bool:
    site, (h, y), (out,) = _site(node, graph), node.inputs, node.outputs
    return site is not None and (h.width, y.width, out.width) == (node.attrs["rank"], site.outputs, site.outputs)


SPECS = (
    OpSpec(
        name="lora_down",
        origin="rule",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("h", "[T, R]"),),
        attrs=(_SITE, _RANK, *_HEADS, _BESIDE),
        fits=_down_fits,
        rows="tokens",
        any_kind=0,
        code=44,
        kernels="the rows of each adapter together, at most 32 at a time, rounded as for the product itself. h is rounded to "
        "bf16 if they are bf16 or int8.",
        doc=f"""
            h_t = x_t A^T in the first elements, with the matrix A [r, K], r <= R, that the adapter of token t has for the
            product. The other elements, and rows without an adapter, are undefined. {_SOURCE}
        """,
    ),
    OpSpec(
        name="lora_up",
        origin="rule",
        inputs=(Operand("h", "[T, R]"), Operand("y", "[T, N]")),
        outputs=(Operand("z", "[T, N]"),),
        attrs=(_SITE, _RANK, *_HEADS),
        fits=_up_fits,
        rows="tokens",
        in_place=((0, 1),),
        code=45,
        kernels="as `lora_down`.",
        doc=f"""
            z_t = y_t + h_t B^T with the matrix B [N, r] of the adapter, which contains its scale; z_t = y_t for rows without an
            adapter, and for adapters without matrices for the product. Lowering merges it into the `linear` or `gate_up` that
            computes y, where h is a further input. {_SOURCE}
        """,
    ),
)
