"""Long documents: reading files, splitting them into chunks, retrieving passages, and answering with citations.

Formats other than text, and retrieval, need the extra `longdoc`: pip install "deepseek-optimizer[longdoc]".
"""

from .citations import Citation, cite
from .document import Document, Page, Problem, TextFile
from .read import read_documents, read_upload
from .recognized import PageReader, RecognizedLine
from .retrieval import Index
from .split import Chunk, split

__all__ = [
    "Chunk",
    "Citation",
    "Document",
    "Index",
    "Page",
    "PageReader",
    "Problem",
    "RecognizedLine",
    "TextFile",
    "cite",
    "read_documents",
    "read_upload",
    "split",
]
