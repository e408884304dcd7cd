"""native/tests/check_exports.py: the functions that a library exports are those of the headers."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_optimizer.backends.cpu.native import library_path

NATIVE = Path(__file__).resolve().parents[1] / "native"

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs binutils")


def check_exports(native: Path, library: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(native / "tests/check_exports.py"), str(library)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def native_with(header: str, folder: Path) -> Path:
    """A copy of the script beside a header of its own."""
    (folder / "include").mkdir()
    (folder / "include/dso.h").write_text(header)
    (folder / "tests").mkdir()
    shutil.copy(NATIVE / "tests/check_exports.py", folder / "tests")
    return folder


def mach_o(symbols: dict[str, int]) -> bytes:
    """A library for macOS with nothing but a table of symbols, each with its n_type."""
    strings, entries = b"\0", b""
    for name, kind in symbols.items():
        entries += struct.pack("<IBBHQ", len(strings), kind, 1, 0, 0)
        strings += name.encode() + b"\0"
    header = struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 6, 2, 40, 0, 0)
    begin = len(header) + 40
    other = struct.pack("<IIQ", 0x2A, 16, 0)  # LC_SOURCE_VERSION
    table = struct.pack("<6I", 2, 24, begin, len(symbols), begin + len(entries), len(strings))
    return header + other + table + entries + strings


@pytest.mark.skipif(not library_path().exists(), reason="the native library was not built")
def test_the_built_library_exports_the_headers(tmp_path):
    done = check_exports(NATIVE, library_path())
    assert done.returncode == 0, done.stderr
    headers = "".join(path.read_text(encoding="utf-8") for path in (NATIVE / "include").glob("*.h"))
    done = check_exports(native_with(f"{headers}\nDSO_API const char* dso_missing(void);\n", tmp_path), library_path())
    assert done.returncode == 1 and "dso_missing of the headers is not exported" in done.stderr


def test_symbols_of_macos(tmp_path):
    native = native_with("DSO_API int32_t dso_one(void);\nDSO_API void dso_two(int32_t n);\n", tmp_path)
    library = tmp_path / "libdso.dylib"
    there = {"_dso_one": 0x0F, "__Znwm": 0x0F, "_local": 0x0E, "_hidden": 0x1F, "_malloc": 0x01}
    library.write_bytes(mach_o(there | {"_dso_two": 0x0F}))
    assert check_exports(native, library).returncode == 0
    library.write_bytes(mach_o(there | {"_dso_two": 0x1F, "_more": 0x0F}))
    done = check_exports(native, library)
    assert done.returncode == 1
    assert "dso_two of the headers is not exported" in done.stderr and "more is exported" in done.stderr
    assert "dso_one" not in done.stderr and "hidden" not in done.stderr
