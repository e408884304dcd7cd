"""Readers: bytes to text, one format a file. `read.read_documents` is for paths, `read.read_upload` for bytes."""
