"""Training data: files of chats and texts are tokenized into sequences, and these are packed into rows and batches."""

from .load import DataOptions, DataReport, load_data
from .packing import Collator, PackedRows, best_fit
from .store import TokenDataset

__all__ = ["Collator", "DataOptions", "DataReport", "PackedRows", "TokenDataset", "best_fit", "load_data"]
