"""Checks that a library exports exactly the functions of the headers, whatever system it is for.

    python native/tests/check_exports.py build/native-macos/libdso.dylib

ELF and PE are read by binutils (NM and OBJDUMP select others than the system's), Mach-O here. Exported C++ symbols are ignored
in Mach-O: a C++ library that is linked statically, as zig's is, exports its operators new and delete.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HEADERS = Path(__file__).resolve().parents[1] / "include"
SYMBOL_TABLE = 2  # LC_SYMTAB
EXTERNAL, PRIVATE, DEFINED = 0x01, 0x10, 0x0E  # N_EXT, N_PEXT, N_TYPE


def declared() -> set[str]:
    """The functions of the headers."""
    text = "\n".join(header.read_text(encoding="utf-8") for header in HEADERS.glob("*.h"))
    return set(re.findall(r"^DSO_API [^(]*?(\w+)\(", text, re.M))


def output_of(tool: str, *arguments: str) -> str:
    command = [os.environ.get(tool.upper(), tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_mach_o(content: bytes) -> Iterator[str]:
    """The names of global symbols that a 64-bit Mach-O file defines."""
    (commands,) = struct.unpack_from("<I", content, 16)
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<II", content, at)
        if command == SYMBOL_TABLE:
            symbols, count, strings, _ = struct.unpack_from("<4I", content, at + 8)
            for i in range(count):
                name, kind = struct.unpack_from("<IB", content, symbols + 16 * i)
                if kind & EXTERNAL and not kind & PRIVATE and kind & DEFINED:
                    yield content[strings + name : content.index(b"\0", strings + name)].decode().removeprefix("_")
        at += size


def exported(library: Path) -> set[str]:
    """The functions that a library exports."""
    content = library.read_bytes()
    if content.startswith(b"\x7fELF"):
        return {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", str(library)).splitlines()}
    if content.startswith(b"MZ"):
        table = output_of("objdump", "-p", str(library)).partition("[Ordinal/Name Pointer] Table")[2]
        return set(re.findall(r"^\s*\[ *\d+\] .*?(\w+)$", table.partition("\n\n")[0], re.M))
    if content.startswith(b"\xcf\xfa\xed\xfe"):
        return {name for name in of_mach_o(content) if not name.startswith("_")}
    raise SystemExit(f"{library} is neither ELF nor PE nor Mach-O of 64 bits")


def main() -> int:
    library = Path(sys.argv[1])
    there, wanted = exported(library), declared()
    for name in sorted(wanted - there):
        print(f"{library}: {name} of the headers is not exported", file=sys.stderr)
    for name in sorted(there - wanted):
        print(f"{library}: {name} is exported, and is not in the headers", file=sys.stderr)
    print(f"{library}: exports {len(there & wanted)} of the {len(wanted)} functions of the headers")
    return 0 if there == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
