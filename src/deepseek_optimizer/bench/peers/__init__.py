"""Engines to compare with, one file each, and the environments they live in.

A peer says what its environment holds and how a side is started; `bench.against` does the rest. To add one: a file here, its
entry in `PEERS`, and its script in `sides/`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """Raises: ConfigError, which lists the peers there are."""
    if name not in PEERS:
        raise ConfigError(f"there is no peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]
