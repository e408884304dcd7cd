"""Whether the installed packages fit each other, by what their own metadata say, and by what those leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..case import Case
from ..finding import Finding
from ..machine import Package

NAME = "versions"
_BESIDE_TORCH = ("torchvision", "torchaudio")


def check(case: Case) -> Iterator[Finding]:
    """Requirements that are not met, and builds for different devices side by side."""
    packages = case.machine.packages
    found = [*_unmet(packages), *_mixed_builds(packages)]
    versions = {name: package.version for name, package in packages.items()}
    for name in ("torch", "transformers"):
        if name not in packages:
            found.append(Finding(NAME, "error", f"{name} is not installed", "", f"pip install {name}", versions))
    yield from found
    if not found:
        shown = ", ".join(f"{n} {versions[n]}" for n in ("torch", "transformers") if n in versions)
        yield Finding(NAME, "ok", f"{shown}; what is installed fits together", facts=versions)


def _unmet(packages: Mapping[str, Package]) -> Iterator[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    installed = {canonicalize_name(name): package for name, package in packages.items()}
    for name, package in packages.items():
        for line in package.requires:
            try:
                need = Requirement(line)
            except InvalidRequirement:
                continue
            other = installed.get(canonicalize_name(need.name))
            if other is None or (need.marker is not None and not need.marker.evaluate({"extra": ""})):
                continue
            if not need.specifier.contains(other.version, prereleases=True):
                yield Finding(
                    NAME, "error", f"{name} {package.version} does not work with {need.name} {other.version}",
                    f"its own metadata ask for {need.name}{need.specifier}",
                    f"pip install '{need.name}{need.specifier}', or another {name}",
                    {name: package.version, need.name: other.version, "needs": str(need)},
                )  # fmt: skip


def _mixed_builds(packages: Mapping[str, Package]) -> Iterator[Finding]:
    """torch and its siblings carry compiled code: 2.9+cpu beside 0.24+cu128 meets every requirement, and fails on import."""
    torch = packages.get("torch")
    for name in _BESIDE_TORCH:
        sibling = packages.get(name)
        if torch is None or sibling is None:
            continue
        ours, theirs = (version.partition("+")[2] for version in (torch.version, sibling.version))
        if ours and theirs and ours != theirs:
            yield Finding(
                NAME, "error", f"{name} {sibling.version} is built for {theirs}, torch {torch.version} for {ours}",
                "they came from different package indexes; operators such as torchvision::nms are then missing",
                f"reinstall both from the index of {ours}: pip install torch {name} "
                f"--index-url https://download.pytorch.org/whl/{ours}",
                {"torch": torch.version, name: sibling.version},
            )  # fmt: skip
