"""Bookkeeping of the KV cache: which block, and which slot for recurrent states, belongs to which sequence. The bytes are held
by a backend's `KvStore`."""

from .block_manager import HOLE, BlockManager, SequenceBlocks
from .forgetting import Forgetting, Groups
from .sequence_states import SequenceStates, states_of_step

__all__ = ["HOLE", "BlockManager", "Forgetting", "Groups", "SequenceBlocks", "SequenceStates", "states_of_step"]
