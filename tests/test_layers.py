"""The package's structure: imports between folders go downwards, files form no cycle, only integration/ uses Transformers'
internals.

The layers are defined in `support/layers.py`. Imports are read from the sources, including those in functions and under
`if TYPE_CHECKING:`.
"""

from __future__ import annotations

import ast
import functools

import pytest

from support.imports import Import, imports, sources
from support.layers import CLI, LAYERS, NAMES, PACKAGE, REST, ROOT, allowed, table, written

BY_NAME = {layer.name: layer for layer in LAYERS}

# Documented modules of Transformers other than its top level -> their documented names.
DOCUMENTED = {
    "transformers.pipelines": {"PIPELINE_REGISTRY"},
    "transformers.utils": {"logging"},
}
WITHOUT_TRANSFORMERS = ("errors", "system", "cache", "quant", "graph", "models", "backends", "engine", "calibration")
# (module, imported module of Transformers) -> reason.
EXCEPTIONS = {
    ("chat.template_job", "transformers.utils"): "a sandboxed process, which does not import this package",
    ("chat.template_job", "transformers.utils.chat_template_utils"): "the same",
    ("config", "transformers.utils.quantization_config"): "the documented base class of a quantization config",
    ("bench.sides.load", "transformers.models.llama.modeling_llama"): "its import must not count as loading",
    ("bench.sides.load", "transformers.models.qwen2.modeling_qwen2"): "the same",
    ("doctor.machine", "transformers.modeling_utils"): "imported to check that it can be, and to measure the time",
}  # fmt: skip
# Private attributes of other packages that are used outside of integration/ -> reason.
PRIVATE = {
    "_compile_jinja_template": "chat/template_job.py, see above",
    "_exit": "os._exit, documented",
    "_int_mm": "torch's int8 product, measured by the bench",
    "_replace": "of named tuples, documented",
    "_version": "torch's counter of writes to a tensor; there is no public one",
    "_forward_hooks": "torch's; there is no public list of a module's hooks",
    "_forward_pre_hooks": "the same",
    "_backward_hooks": "the same",
    "_backward_pre_hooks": "the same",
}


modules = functools.cache(sources)


@functools.cache
def all_imports() -> list[Import]:
    return imports(modules())


@functools.cache
def own_imports() -> list[Import]:
    """Imports of this package's own modules."""
    return [found for found in all_imports() if found.target in modules()]


@functools.cache
def folders() -> set[str]:
    return {module.rpartition(".")[2] for module, file in modules().items() if file.name == "__init__.py"}


def inner(module: str) -> str:
    """A module's name without that of the package."""
    return module.removeprefix(f"{PACKAGE}.")


def layer_of(module: str) -> str:
    first, _, rest = module.partition(".")
    return CLI if first == CLI else rest.partition(".")[0] or "__init__"


def level_of(module: str) -> tuple[int, str]:
    """A module's level in its layer, and the name of its part there: a subfolder, a file, or REST."""
    layer, part = BY_NAME[layer_of(module)], module.split(".")[2:3]
    names = [name for level in layer.levels for name in level]
    name = part[0] if part and part[0] in names else REST
    found = [i for i, level in enumerate(layer.levels) if name in level]
    return (found[0] if found else -1), name


def cycles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or indirectly (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = {}
    for each in found:
        graph.setdefault(each.module, set()).add(each.target)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for target in sorted(graph.get(module, ())):
            if target not in number:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], number[target])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in graph.get(module, ()):
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return groups


def upward(found: list[Import]) -> list[str]:
    """Imports from a layer that the importer may not use."""
    return [str(i) for i in found if (a := layer_of(i.module)) != (b := layer_of(i.target)) and b not in allowed(BY_NAME[a])]


def upward_inside(found: list[Import]) -> list[str]:
    """The same between the levels of one folder. A subfolder's `__init__` belongs to the subfolder."""
    wrong = []
    for i in found:
        if layer_of(i.module) != layer_of(i.target) or i.target.count(".") == 1 or i.module.count(".") == 1:
            continue
        (height, name), (low, below) = level_of(i.module), level_of(i.target)
        files = not {name, below} & folders()
        if not (low < height or name == below or (low == height and files)):
            wrong.append(str(i))
    return wrong


def internals(found: list[Import]) -> list[str]:
    """Imports of undocumented parts of Transformers outside of integration/, and any import of it in the lowest layers."""
    wrong = []
    for i in found:
        if i.target.partition(".")[0] != "transformers" or layer_of(i.module) == "integration":
            continue
        if layer_of(i.module) in WITHOUT_TRANSFORMERS:
            wrong.append(str(i))
            continue
        public = (i.target == "transformers" and i.names) or (i.names and set(i.names) <= DOCUMENTED.get(i.target, set()))
        if not public and (inner(i.module), i.target) not in EXCEPTIONS:
            wrong.append(str(i))
    return wrong


def made(*pairs: str, kind: str = "top") -> list[Import]:
    return [Import(f"{PACKAGE}.{a}", f"{PACKAGE}.{b}", (), 1, kind) for a, b in (pair.split(" -> ") for pair in pairs)]


def test_every_folder_and_file_has_a_layer():
    assert sorted({layer_of(module) for module in modules()} - {"__main__"}) == sorted(NAMES)
    for layer in LAYERS:
        folder = layer.name if layer.name == CLI else f"{PACKAGE}.{layer.name}"
        below = {module.removeprefix(f"{folder}.").partition(".")[0] for module in modules() if module.startswith(f"{folder}.")}
        assert {name for level in layer.levels for name in level} - {REST} <= below, layer.name
        subfolders = {
            name for name in below if f"{folder}.{name}" in modules() and modules()[f"{folder}.{name}"].name == "__init__.py"
        }
        assert subfolders <= {name for level in layer.levels for name in level}, layer.name


@pytest.mark.every_run
def test_files_form_no_cycle():
    assert cycles(own_imports()) == []


@pytest.mark.parametrize("kind", ["top", "late", "type"])
def test_folders_import_downwards_only(kind):
    assert upward([i for i in own_imports() if i.kind == kind and i.module != f"{PACKAGE}.__main__"]) == []


@pytest.mark.parametrize("kind", ["top", "late", "type"])
def test_inside_a_folder_levels_import_downwards_only(kind):
    assert upward_inside([i for i in own_imports() if i.kind == kind]) == []


def test_transformers_internals_in_integration_only():
    assert internals(all_imports()) == []
    used = {(inner(i.module), i.target) for i in all_imports()}
    assert set(EXCEPTIONS) <= used  # unused exceptions must be removed


@pytest.mark.every_run
def test_private_attributes_in_integration_only():
    trees = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in modules().items()}
    ours = {name for tree in trees.values() for name in _defined(tree)}
    used = {
        (name, inner(module))
        for module, tree in trees.items()
        if layer_of(module) != "integration"
        for name in _private(tree) - ours
    }
    assert {pair for pair in used if pair[0] not in PRIVATE} == set()
    assert set(PRIVATE) <= {name for name, _ in used}


def _defined(tree: ast.AST) -> set[str]:
    """Names defined in a file: functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id in ("self", "cls", "twin"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def _private(tree: ast.AST) -> set[str]:
    """Attributes with a leading underscore that a file reads or writes, by name or through `getattr` and similar functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr")
        ):
            found |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_nothing_patches_the_import_system():
    for module, file in modules().items():
        assert "meta_path" not in file.read_text(encoding="utf-8"), module


def test_contributing_has_the_table_of_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert table() in text and written(text) == text, "run: PYTHONPATH=tests python -m support.layers"


@pytest.mark.parametrize(
    ("check", "found"),
    [
        (cycles, made("a.b -> a.c", "a.c -> a.d", "a.d -> a.b")),
        (cycles, made("a.b -> a.c") + made("a.c -> a.b", kind="late")),
        (upward, made("graph.ir -> models.llama")),
        (upward, made("train.job -> longdoc.strategy_protocol")),
        (upward, made("engine.core -> serving", kind="type")),
        (upward_inside, made("integration.bind.runtime -> integration.model.report", kind="late")),
        (upward_inside, made("engine.sampling.torch_sampler -> engine.speculative.base")),
        (upward_inside, made("server.http.upload -> server.app")),
        (internals, [Import(f"{PACKAGE}.train.attention_function", "transformers.masking_utils", ("sdpa_mask",), 1, "late")]),
        (internals, [Import(f"{PACKAGE}.models.rope", "transformers", ("LlamaConfig",), 1, "late")]),
        (internals, [Import(f"{PACKAGE}.train.attention_function", "transformers.utils", ("ModelOutput",), 1, "top")]),
    ],
)  # fmt: skip
def test_the_checks_detect_violations(check, found):
    assert check(found)


def test_the_checks_accept_valid_imports():
    fine = made(
        "models.llama -> graph.ir", "train.job -> chat.template", "integration.load.loader -> integration.model.wrapper"
    )
    assert not (cycles(fine) or upward(fine) or upward_inside(fine))
    assert not internals([Import(f"{PACKAGE}.train.trainer", "transformers", ("Trainer",), 1, "top")])
