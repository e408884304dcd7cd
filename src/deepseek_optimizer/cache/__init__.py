"""KV cache bookkeeping: which block belongs to which sequence. The bytes belong to a backend's `KvStore`."""

from .block_manager import HOLE, BlockManager, SequenceBlocks
from .forgetting import Forgetting

__all__ = ["HOLE", "BlockManager", "Forgetting", "SequenceBlocks"]
