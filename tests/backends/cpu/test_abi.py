"""The ctypes bindings of the C interface match `dso.h` and `dso_train.h`: structs, prototypes, constants."""

from __future__ import annotations

import ctypes as C
import re
from pathlib import Path

import pytest

from deepseek_optimizer.backends.base import BLOCK_TOKENS, DECODE, PREFILL
from deepseek_optimizer.backends.cpu import native, native_train, structs
from deepseek_optimizer.errors import CheckpointChangedError, NotEnoughMemoryError
from deepseek_optimizer.graph.ops import OPS

INCLUDE = Path(__file__).parents[3] / "native" / "include"
TEXT, TRAIN_TEXT = (re.sub(r"/\*.*?\*/", "", (INCLUDE / name).read_text(), flags=re.S) for name in ("dso.h", "dso_train.h"))
SCALARS = {
    "int32_t": C.c_int32, "uint32_t": C.c_uint32, "int64_t": C.c_int64, "float": C.c_float, "double": C.c_double, "void": None,
}  # fmt: skip
CONSTANTS = {name: int(value) for name, value in re.findall(r"\b(DSO_\w+)\s*=\s*(-?\d+)", TEXT + TRAIN_TEXT)}
STRUCTS = {"dso_train_heads": native_train.TrainHeads}  # structs that are members of others
TRAIN_STRUCTS = [t for t in vars(native_train).values() if isinstance(t, type) and issubclass(t, C.Structure)]


def ctype(declared: str):
    """`const int32_t*` and the like."""
    plain = declared.replace("const", "").strip()
    if plain == "char*":
        return C.c_char_p
    return C.c_void_p if "*" in plain else {**SCALARS, **STRUCTS}[plain]


def declarations(text: str):
    """(type, name, length or None) of `type a, b[4];` lists."""
    for line in filter(str.strip, text.split(";")):
        kind, names = re.fullmatch(r"\s*((?:const\s+)?\w+\s*\**)\s*(.*?)\s*", line, re.S).groups()
        for name in names.split(","):
            star, name, length = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", name).groups()
            yield ctype(kind + star), name, length


@pytest.mark.parametrize(
    "struct",
    [
        structs.Weight,
        structs.Slot,
        structs.Step,
        structs.Batch,
        structs.Rotation,
        structs.StateShape,
        structs.Choice,
        structs.Decode,
        structs.DraftedDecode,
        structs.Stages,
        structs.NativeCpu,
        structs.RunCounts,
    ],
)
def test_structs(struct):
    name = re.search(r"dso_\w+", struct.__doc__)[0]
    body = re.search(rf"typedef struct {name} {{(.*?)}}", TEXT, re.S)[1]
    renamed = {"in": "inputs", "out": "outputs"} if struct is structs.Step else {}
    expected = [(renamed.get(n, n), t * int(length) if length else t) for t, n, length in declarations(body)]
    assert [(name, kind) for name, kind in struct._fields_] == expected


@pytest.mark.parametrize("struct", TRAIN_STRUCTS)
def test_structs_of_training(struct):
    name = re.search(r"dso_\w+", struct.__doc__)[0]
    body = re.search(rf"typedef struct {name} {{(.*?)}}", TRAIN_TEXT, re.S)[1]
    expected = [(n, kind * int(length) if length else kind) for kind, n, length in declarations(body)]
    assert list(struct._fields_) == expected


@pytest.mark.parametrize(("text", "signatures"), [(TEXT, native._SIGNATURES), (TRAIN_TEXT, native_train.SIGNATURES)])
def test_prototypes(text, signatures):
    actual = re.findall(r"DSO_API\s+([\w\s]+?\**)\s*(dso_\w+)\(([^)]*)\)", text)
    expected = {}
    for result, name, arguments in actual:
        kinds = [ctype(re.sub(r"\b\w+$", "", a.strip())) for a in arguments.split(",")] if arguments != "void" else []
        expected[name] = (ctype(result), kinds)
    assert signatures == expected


def test_constants():
    assert native.ABI_VERSION == int(re.search(r"#define DSO_ABI_VERSION (\d+)", TEXT)[1])
    assert native.BLOCK_TOKENS == BLOCK_TOKENS == int(re.search(r"#define DSO_BLOCK_TOKENS (\d+)", TEXT)[1])
    assert (DECODE, PREFILL) == (CONSTANTS["DSO_PHASE_DECODE"], CONSTANTS["DSO_PHASE_PREFILL"])
    names = {"fp32": "F32", "head_norm": "RMS_NORM", "lm_head": "LINEAR", "lookup": "EMBEDDING"}
    codes = {name: spec.code for name, spec in OPS.items() if spec.code is not None}
    for prefix, values in (
        ("DSO_", native.FORMATS),
        ("DSO_SLOT_", native.SLOT_KINDS),
        ("DSO_KV_", native.KV_TYPES),
        ("DSO_OP_", codes),
        ("DSO_TYPE_", {"f32": native_train.TYPES["float32"], "bf16": native_train.TYPES["bfloat16"]}),
        ("DSO_PRODUCT_", {**native_train.PRODUCT_FORMS, "add": native_train.ADD, "exact": native_train.EXACT}),
    ):
        for name, value in values.items():
            assert CONSTANTS[prefix + names.get(name, name.upper())] == value, name
    assert {v for n, v in CONSTANTS.items() if n.startswith("DSO_OP_")} == set(codes.values())
    assert {f"DSO_FLAG_{n.upper()}": v for n, v in native.FLAGS.items()} == {
        n: v for n, v in CONSTANTS.items() if n.startswith("DSO_FLAG_")
    }
    assert native.VECTOR == CONSTANTS["DSO_VECTOR"]
    assert native.UNDECIDED == CONSTANTS["DSO_UNDECIDED"]
    assert (native._EINVAL, native._ENOMEM) == (CONSTANTS["DSO_EINVAL"], CONSTANTS["DSO_ENOMEM"])


def test_attributes_of_ops():
    attrs = [attr for spec in OPS.values() for attr in spec.attrs]
    assert {attr.step_field for attr in attrs} - {""} <= {name for name, *_ in structs.Step._fields_}
    flags = {attr.flag for attr in attrs} | {flag for attr in attrs for _, flag in attr.more_flags}
    assert flags - {""} | {"last", "ids"} == set(native.FLAGS)


def test_a_negative_number_is_an_error():
    assert native.number(7) == 7
    errors = {"DSO_EINVAL": ValueError, "DSO_ENOMEM": NotEnoughMemoryError, "DSO_EFILE": CheckpointChangedError}
    for code, error in errors.items():
        with pytest.raises(error):
            native.number(-CONSTANTS[code])
