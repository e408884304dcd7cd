"""Training data: files of chats and texts to sequences of tokens, and these to rows and batches."""

from .load import DataOptions, DataReport, load_data
from .packing import Collator, PackedRows, best_fit
from .store import TokenDataset

__all__ = ["Collator", "DataOptions", "DataReport", "PackedRows", "TokenDataset", "best_fit", "load_data"]
