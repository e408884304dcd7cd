"""`OpSpec`: everything that the graph code and the backends need to know about an op, except how to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from ..ir import Graph, Node

Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Operand:
    """An input, an output or a weight.

    Attributes:
        name: its name in the op's formula.
        shape: for readers; T: token rows, R: selected rows.
        optional: the node may leave it out. Only the last inputs may be optional.
        many: stands for one or more operands of this form, and is then the only one of its list.
    """

    name: str
    shape: str
    optional: bool = False
    many: bool = False


@dataclass(frozen=True)
class AttrType:
    """The type of an attribute. `text` names it in messages and documentation."""

    text: str
    accepts: Callable[[Any], bool]


def one_of(*choices: str) -> AttrType:
    """A string out of `choices`."""
    return AttrType(" or ".join(f'"{choice}"' for choice in choices), lambda value: value in choices)


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


INT = AttrType("int", lambda value: isinstance(value, Integral) and not isinstance(value, bool))
FLOAT = AttrType("float", lambda value: isinstance(value, Real) and not isinstance(value, bool))
BOOL = AttrType("bool", lambda value: isinstance(value, bool))
NAME = AttrType("parameter name or None", _is_name)
NAMES = AttrType("tuple of parameter names or None", lambda value: isinstance(value, tuple) and all(map(_is_name, value)))


def _is_rows(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (0,)
    return value is None or all(part is None or (isinstance(part, tuple) and len(part) == 3) for part in parts)


ROWS = AttrType("tuple of (begin, end, total) or None", _is_rows)
ROPE = AttrType("models.rope.RopeSpec", lambda value: hasattr(value, "inv_freq"))

REQUIRED: Any = object()


@dataclass(frozen=True)
class Attr:
    """An attribute of a node.

    Attributes:
        default: what a node without the attribute means; REQUIRED: a node must have it.
        step_field: the field of the native library's `dso_step` that holds the value; "" where none does.
        flag: the native flag (`DSO_FLAG_*`, in lower case) that is set where the attribute equals `flag_value`.
        more_flags: further pairs (value, flag).
    """

    name: str
    type: AttrType
    doc: str = ""
    default: Any = REQUIRED
    step_field: str = ""
    flag: str = ""
    flag_value: Any = True
    more_flags: tuple[tuple[Any, str], ...] = ()

    def flags_of(self, node: Node) -> list[str]:
        """The native flags that the node's value sets."""
        pairs = (*(((self.flag_value, self.flag),) if self.flag else ()), *self.more_flags)
        return [flag for value, flag in pairs if self.of(node) == value]

    def of(self, node: Node) -> Any:
        """The node's value of this attribute, or the default."""
        return node.attrs[self.name] if self.default is REQUIRED else node.attrs.get(self.name, self.default)


def step_attr(name: str, type: AttrType, doc: str = "", default: Any = REQUIRED) -> Attr:
    """An attribute that the native step holds under the same name."""
    return Attr(name, type, doc, default, step_field=name)


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One op.

    Attributes:
        name: `Node.op`.
        doc: the formula and its source, in Markdown.
        origin: what creates such nodes. "model": model families; "rule": fusion rules (`graph/rules`), attention modes and
            adapters; "lowering": a backend while it compiles. Graphs passed to a backend have no ops of the last kind.
        inputs, outputs, weights: the operands, in order.
        attrs: the attributes.
        fits: whether the widths of a node's values and its attributes fit each other and the graph. Called once the numbers of
            operands and the attributes' types have been checked.
        weight_shapes: a node's parameters, biases included, with the shapes that Transformers stores them in.
        stacked: matrices per expert in the node's weight, where that is a stack of matrices with three axes; else 0.
        reads, writes: the part of its layer's cache that a node reads or writes.
        read_layers: names of the attributes with the layers that it reads; negative values stand for none.
        returns: what a node contributes to the step's result.
        rows: "any": all values have the same row set, the tokens or the selected rows. "tokens": all rows are tokens.
            "select": inputs have token rows, outputs selected rows.
        repeated_inputs, repeated_outputs: indices of values with several rows per token.
        in_place: pairs (output, input), by index: the output may overwrite the input, if no later node reads that.
        product: input 0 is multiplied with packed matrices, so it is read in the kind that their format needs.
        any_kind: index of the output that the native kernel can write in any kind (f32, bf16, q8, q16); None: only f32.
        code: the op's number in the native library, `DSO_OP_*` of `dso.h`; None where lowering replaces the op.
        kernels: how native kernels divide the work, where decode and prefill differ.
    """

    name: str
    doc: str
    origin: Literal["model", "rule", "lowering"] = "model"
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    weights: tuple[Operand, ...] = ()
    attrs: tuple[Attr, ...] = ()
    fits: Callable[[Node, Graph], bool]
    weight_shapes: Callable[[Node, Graph], Shapes] = lambda node, graph: []
    stacked: int = 0
    reads: Literal["cache", "latents", "index keys", "rows"] | None = None
    writes: Literal["cache", "latents", "index keys", "rows"] | None = None
    read_layers: tuple[str, ...] = ("layer",)
    returns: Literal["logits", "hidden states", "draft states"] | None = None
    rows: Literal["any", "tokens", "select"] = "any"
    repeated_inputs: tuple[int, ...] = ()
    repeated_outputs: tuple[int, ...] = ()
    in_place: tuple[tuple[int, int], ...] = ()
    product: bool = False
    any_kind: int | None = None
    code: int | None = None
    kernels: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether a step needs such nodes even if no other node reads their outputs. Hidden states do not count: they are
        computed only on request. Draft states do: they are computed in any case, and returned on request."""
        return self.writes is not None or self.returns in ("logits", "draft states")
