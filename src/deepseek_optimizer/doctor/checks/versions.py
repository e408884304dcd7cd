"""Whether the installed packages are compatible, by their metadata and by build tags that metadata does not cover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..case import Case
from ..finding import Finding
from ..machine import Package

NAME = "versions"
_BESIDE_TORCH = ("torchvision", "torchaudio")


def check(case: Case) -> Iterator[Finding]:
    """Finds requirements that are not met, and packages built for different devices."""
    packages = case.machine.packages
    findings = [*_unmet(packages), *_mixed_builds(packages)]
    versions = {name: package.version for name, package in packages.items()}
    for name in ("torch", "transformers"):
        if name not in packages:
            findings.append(Finding(NAME, "error", f"{name} is not installed", "", f"pip install {name}", versions))
    yield from findings
    if not findings:
        shown = ", ".join(f"{n} {versions[n]}" for n in ("torch", "transformers") if n in versions)
        yield Finding(NAME, "ok", f"{shown}; the installed packages are compatible", facts=versions)


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
                    f"its metadata requires {need.name}{need.specifier}",
                    f"pip install '{need.name}{need.specifier}', or install another version of {name}",
                    {name: package.version, need.name: other.version, "needs": str(need)},
                )  # fmt: skip


def _mixed_builds(packages: Mapping[str, Package]) -> Iterator[Finding]:
    """torch and its sibling packages contain compiled code: torch 2.9+cpu with torchvision 0.24+cu128 meets every requirement,
    but fails on import."""
    torch = packages.get("torch")
    for name in _BESIDE_TORCH:
        sibling = packages.get(name)
        if torch is None or sibling is None:
            continue
        ours, theirs = (version.partition("+")[2] for version in (torch.version, sibling.version))
        if ours and theirs and ours != theirs:
            yield Finding(
                NAME, "error", f"{name} {sibling.version} is built for {theirs}, torch {torch.version} for {ours}",
                "they came from different package indexes, so operators such as torchvision::nms are missing",
                f"reinstall both from the index of {ours}: pip install torch {name} "
                f"--index-url https://download.pytorch.org/whl/{ours}",
                {"torch": torch.version, name: sibling.version},
            )  # fmt: skip
