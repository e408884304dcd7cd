"""Long documents: reading files, cutting them by tokens, finding passages, and answers with their places in the text.

Reading other formats than text, and retrieval, need the extra `longdoc`: pip install "deepseek-optimizer[longdoc]".
"""

from .citations import Citation, cite
from .document import Document, Page, Problem, TextFile
from .read import read_documents, read_upload
from .retrieval import Index
from .split import Chunk, split

__all__ = [
    "Chunk",
    "Citation",
    "Document",
    "Index",
    "Page",
    "Problem",
    "TextFile",
    "cite",
    "read_documents",
    "read_upload",
    "split",
]
