"""KV cache bookkeeping: which block belongs to which sequence. The bytes belong to a backend's `KvStore`."""

from .block_manager import BlockManager, SequenceBlocks

__all__ = ["BlockManager", "SequenceBlocks"]
