"""Installs the ARM64 wheel under qemu-user, with all that it depends on, and asks SmolLM2 a question: `make test-arm-wheel`.

    python build_tools/check_arm_wheel.py WHEEL --model DIRECTORY_OR_GGUF [--folder build/arm-wheel] [--cpu max]

Python and the system's libraries are Debian's for ARM64; `debootstrap --foreign` downloads them, and all of them run in the
emulator only. uv chooses and unpacks the dependencies, for which pip would take half an hour there; pip installs the wheel
itself in the emulator, so that its tags meet the processor that they are for.
"""

from __future__ import annotations

import argparse
import email
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

SUITE = "trixie"
PACKAGES = "python3,python3-pip,ca-certificates,libgomp1"
MIRROR = "http://deb.debian.org/debian"
# The newest whose wheel for ARM64 on PyPI is for CPUs; later ones require CUDA's libraries, 3 GB.
TORCH = "torch<2.11"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
NEEDED = {"qemu-aarch64": "qemu-user", "debootstrap": "debootstrap", "dpkg-deb": "dpkg"}


def make_root(root: Path) -> None:
    """Debian for ARM64 below `root`: unpacked, not configured, which Python does not need."""
    if (root / ".unpacked").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    options = ["--foreign", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}"]
    subprocess.run(["debootstrap", *options, SUITE, str(root), MIRROR], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    (root / ".unpacked").touch()


class Emulated:
    """Python for ARM64, with the packages in `site`.

    Args:
        root: Debian for ARM64.
        site: directory of the installed packages.
        cpu: qemu's name of a processor.
    """

    def __init__(self, root: Path, site: Path, cpu: str) -> None:
        python = next(p for p in (root / "usr/bin").glob("python3.*") if p.name.removeprefix("python3.").isdigit())
        self.version = python.name.removeprefix("python")
        self.command = ["qemu-aarch64", "-cpu", cpu, "-L", str(root), str(python)]
        self.environment = os.environ | {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the second command then starts faster

    def run(self, *arguments: str) -> str:
        """Standard output of Python with these arguments."""
        start, before = time.monotonic(), os.times()
        done = subprocess.run([*self.command, *arguments], env=self.environment, stdout=subprocess.PIPE, text=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        times = f"{time.monotonic() - start:.0f} s, {used:.0f} s of processor time"
        print(f"python {' '.join(arguments)[:100]}: {times}", flush=True)
        if done.returncode != 0:
            raise SystemExit(f"ended with status {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout


def install(python: Emulated, wheel: Path, site: Path) -> None:
    """The wheel's dependencies by uv, for the other processor; then the wheel by its own pip, in the emulator."""
    platform = ["--python-platform", "aarch64-manylinux_2_28", "--python-version", python.version]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", *platform, "--only-binary=:all:", "--target", str(site)]
    subprocess.run([*uv, TORCH, *requirements(wheel)], check=True)
    for earlier in (*site.glob("deepseek_optimizer*"), site / "bin"):  # pip replaces nothing in a target
        shutil.rmtree(earlier, ignore_errors=True)
    python.run("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site), str(wheel))


def requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata says that it needs, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    return [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, default=Path("build/arm-wheel"), help="what is downloaded and installed: 1.5 GB")
    parser.add_argument("--cpu", default="max", help="qemu's name of a processor; neoverse-n1 is emulated faster")
    a = parser.parse_args()
    if missing := [package for program, package in NEEDED.items() if shutil.which(program) is None]:
        print(f"needs Debian's {' and '.join(missing)}: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    root, site = a.folder.resolve() / "root", a.folder.resolve() / "site"
    root.parent.mkdir(parents=True, exist_ok=True)
    make_root(root)
    python = Emulated(root, site, a.cpu)
    install(python, a.wheel.resolve(), site)
    facts = json.loads(python.run(str(site / "bin/dso"), "info", "--json"))
    print(json.dumps(facts, indent=1))
    if facts["backend"] != "cpu" or not facts["isa"].startswith("neon"):
        print(f"the native backend does not run: {facts}", file=sys.stderr)
        return 1
    asked = ["run", str(a.model.resolve()), QUESTION, "--max-new-tokens", "16", "--temperature", "0", "--json"]
    reply = json.loads(python.run(str(site / "bin/dso"), *asked))
    print(json.dumps(reply, indent=1))
    if ANSWER not in reply["text"]:
        print(f"{QUESTION} {reply['text']!r}: {ANSWER} is expected", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
