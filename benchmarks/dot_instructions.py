"""Counts the instructions of the inner loops of integer products on ARM64, by disassembling them. Needs no ARM machine.

    python -m benchmarks.dot_instructions [--compiler aarch64-linux-gnu-g++]

A loop's instructions are divided by the weights that it multiplies, times tokens: what a CPU whose speed is limited by
instructions spends on each. `native/tests/dot_loops.cpp` has the loops.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[1] / "native"
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-ffp-contract=off", "-fno-math-errno",
    "-Wno-unused-function", "-DDSO_ISA_NAMESPACE=loops", '-DDSO_LANES="../kernels/neon/lanes.hpp"',
    f"-I{NATIVE / 'include'}", f"-I{NATIVE / 'kernels'}",
)  # fmt: skip
GROUP = 512  # weights of an iteration: 32 columns of 16 outputs


@dataclass(frozen=True)
class Variant:
    name: str
    march: str
    header: str | None  # what it adds to the lanes


VARIANTS = (
    Variant("neon", "armv8-a", None),
    Variant("neon-dotprod", "armv8.2-a+dotprod", "lane_dots.hpp"),
    Variant("neon-i8mm", "armv8.2-a+dotprod+i8mm+bf16", "pairs.hpp"),
)
PRODUCTS = re.compile(r"^(sdot|udot|usdot|sudot|smmla|ummla|usmmla|smull2?|smlal2?)$")
# Function of dot_loops.cpp -> (format, tokens)
LOOPS = {
    "int4_1": ("int4", 1), "int4_4": ("int4", 4), "int8_1": ("int8", 1), "int8_4": ("int8", 4),
    "int4_panel": ("int4, panel", 4), "int8_panel": ("int8, panel", 4),
}  # fmt: skip


def assembly(compiler: str, variant: Variant) -> str:
    """The file compiled for a variant, as assembly."""
    panels = [f'-DDSO_PANELS="../kernels/neon/{variant.header}"'] if variant.header else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "loops.s"
        source = str(NATIVE / "tests" / "dot_loops.cpp")
        subprocess.run([compiler, *FLAGS, *panels, f"-march={variant.march}", "-S", source, "-o", str(out)], check=True)
        return out.read_text("utf-8")


def functions(text: str) -> dict[str, list[str]]:
    """The lines of each function."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"^([A-Za-z_][\w.$]*):", line):
            lines = found.setdefault(match[1], [])
        else:
            lines.append(line)
    return found


def largest_loop(lines: list[str]) -> tuple[int, int] | None:
    """Instructions, and those that multiply, of the loop with the most of the latter. None: no loop multiplies."""
    places = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"^(\.L\w+):", line))}
    best = None
    for i, line in enumerate(lines):
        match = re.match(r"^\t(?:b|b\.\w+|b[a-z]{2}|cbn?z|tbn?z)\t(?:.*,\s*)?(\.L\w+)$", line)
        if not match or places.get(match[1], i) >= i:
            continue
        names = [text.split()[0] for text in lines[places[match[1]] : i + 1] if re.match(r"^\t[a-z]", text)]
        products = sum(bool(PRODUCTS.match(name)) for name in names)
        if products and (best is None or products > best[1]):
            best = (len(names), products)
    return best


def reached(name: str, all_functions: dict[str, list[str]]) -> list[str]:
    """The lines of a function, or of the one that it ends in."""
    lines = all_functions[name]
    if largest_loop(lines):
        return lines
    for line in lines:
        if (match := re.match(r"^\tbl?\t([A-Za-z_][\w.$]*)$", line)) and match[1] in all_functions:
            return all_functions[match[1]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    compiler = parser.parse_args().compiler
    print("| instruction set | weights | tokens | instructions of 512 weights | of which multiply | per weight and token |")
    print("|---|---|---|---|---|---|")
    for variant in VARIANTS:
        found = functions(assembly(compiler, variant))
        for name, (weights, tokens) in LOOPS.items():
            loop = largest_loop(reached(name, found)) if name in found else None
            if loop:
                count, products = loop
                print(f"| {variant.name} | {weights} | {tokens} | {count} | {products} | {count / GROUP / tokens:.3f} |")


if __name__ == "__main__":
    main()
