"""Other engines to compare with, one per file, and their virtual environments.

A peer defines the packages of its environment and the command of its side; `bench.against` does the rest. To add one: a file
here, its entry in `PEERS`, and its script in `sides/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ...errors import ConfigError
from .base import Peer
from .llama_cpp import BUILDS, LlamaCpp
from .openvino import OpenVino
from .transformers import Transformers
from .vllm import Vllm

_ALL: tuple[Peer, ...] = (Transformers(), *map(LlamaCpp, BUILDS), OpenVino(), Vllm())
PEERS: Mapping[str, Peer] = MappingProxyType({peer.name: peer for peer in _ALL})


def get_peer(name: str) -> Peer:
    """Raises ConfigError, which lists the known peers."""
    if name not in PEERS:
        raise ConfigError(f"unknown peer {name!r}; use one of {', '.join(PEERS)}")
    return PEERS[name]


def versions_of(names: Sequence[str]) -> dict[str, str]:
    """Package -> version of each named peer that has an environment of its own."""
    pinned = [text.partition("==") for name in names for text in get_peer(name).requirements if "==" in text]
    return {package: version for package, _, version in pinned if not package.startswith("-")}
