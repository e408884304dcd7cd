"""Bookkeeping of the KV cache: which block belongs to which sequence. The bytes are held by a backend's `KvStore`."""

from .block_manager import HOLE, BlockManager, SequenceBlocks
from .forgetting import Forgetting

__all__ = ["HOLE", "BlockManager", "Forgetting", "SequenceBlocks"]
