"""Counts the instructions of the inner loops of integer products on ARM64, by disassembling them. Needs no ARM machine.

    python -m benchmarks.dot_instructions [--compiler aarch64-linux-gnu-g++]
    python -m benchmarks.dot_instructions --object quants.o --function q4_0    # the loops of any object file

A loop's instructions are divided by its multiplications, weights times tokens: what a CPU whose speed is limited by
instructions spends on each. `native/tests/dot_loops.cpp` has the loops.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[1] / "native"
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-ffp-contract=off", "-fno-math-errno",
    "-Wno-unused-function", "-DDSO_ISA_NAMESPACE=loops", '-DDSO_LANES="../kernels/neon/lanes.hpp"',
    f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'kernels'}",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    name: str
    march: str
    header: str | None  # what it adds to the lanes


VARIANTS = (
    Variant("neon", "armv8-a", None),
    Variant("neon-dotprod", "armv8.2-a+dotprod", "lane_panels.hpp"),
    Variant("neon-i8mm", "armv8.2-a+dotprod+i8mm+bf16", "pairs.hpp"),
)
# Multiplications of bytes that an instruction does.
PRODUCTS = {
    **dict.fromkeys(("sdot", "udot", "usdot", "sudot"), 16), **dict.fromkeys(("smmla", "ummla", "usmmla"), 32),
    **dict.fromkeys(("smull", "smull2", "smlal", "smlal2"), 8),
}  # fmt: skip
# Function of dot_loops.cpp -> (format, tokens)
LOOPS = {
    "int4_1": ("int4", 1), "int4_4": ("int4", 4), "int8_1": ("int8", 1), "int8_4": ("int8", 4),
    "int4_panel": ("int4, panel", 4), "int8_panel": ("int8, panel", 4),
}  # fmt: skip

Code = list[tuple[int, str, str]]  # address, name and operands of each instruction


@dataclass(frozen=True)
class Loop:
    instructions: int
    multiplying: int  # instructions
    products: int

    @property
    def cost(self) -> float:
        return self.instructions / self.products


def compiled(compiler: str, variant: Variant, folder: Path) -> Path:
    """dot_loops.cpp compiled for a variant."""
    panels = [f'-DDSO_PANELS="../kernels/neon/{variant.header}"'] if variant.header else []
    out, source = folder / f"{variant.name}.o", NATIVE / "tests" / "dot_loops.cpp"
    subprocess.run([compiler, *FLAGS, *panels, f"-march={variant.march}", "-c", str(source), "-o", str(out)], check=True)
    return out


def functions(objdump: str, path: Path) -> dict[str, Code]:
    """The instructions of each function of an object file."""
    command = [objdump, "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Code] = {}
    code: Code = []
    for line in text.splitlines():
        if match := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            code = found.setdefault(match[1], [])
        elif match := re.match(r"^\s+([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            code.append((int(match[1], 16), match[2], match[3]))
    return found


def loops(code: Code) -> Iterator[Loop]:
    """The loops that multiply: what lies between a branch backwards and its target."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    for i, (_, name, operands) in enumerate(code):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if not re.match(r"^(b|b\.\w+|cbn?z|tbn?z)$", name) or not target or places.get(int(target[1], 16), i) >= i:
            continue
        names = [n for _, n, _ in code[places[int(target[1], 16)] : i + 1]]
        multiplying = [PRODUCTS[n] for n in names if n in PRODUCTS]
        if multiplying:
            yield Loop(len(names), len(multiplying), sum(multiplying))


def inner(name: str, all_functions: dict[str, Code]) -> Loop | None:
    """The loop of a function that multiplies most, or of one that it calls."""
    code = all_functions[name]
    called = [match[1] for _, n, operands in code if n in ("b", "bl") and (match := re.search(r"<(.+?)>$", operands))]
    for candidate in (code, *(all_functions[c] for c in called if c in all_functions)):
        if found := list(loops(candidate)):
            return max(found, key=lambda loop: loop.products)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--objdump", default="aarch64-linux-gnu-objdump")
    parser.add_argument(
        "--object", action="append", type=Path, help="print the loops of this object file instead; may be repeated"
    )
    parser.add_argument("--function", default="", help="only of functions whose name matches this regular expression")
    chosen = parser.parse_args()
    if chosen.object:
        print("| file | function | instructions | of which multiply | per weight and token |\n|---|---|---|---|---|")
        for path in chosen.object:
            for name, code in functions(chosen.objdump, path).items():
                if not re.search(chosen.function, name):
                    continue
                for seen in loops(code):
                    print(f"| {path.name} | {name} | {seen.instructions} | {seen.multiplying} | {seen.cost:.3f} |")
        return
    print("| instruction set | weights | tokens | instructions of 512 weights | of which multiply | per weight and token |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            found = functions(chosen.objdump, compiled(chosen.compiler, variant, Path(folder)))
            for name, (weights, tokens) in LOOPS.items():
                if name in found and (loop := inner(name, found)):
                    each = f"{loop.instructions} | {loop.multiplying} | {loop.cost:.3f}"
                    print(f"| {variant.name} | {weights} | {tokens} | {each} |")


if __name__ == "__main__":
    main()
