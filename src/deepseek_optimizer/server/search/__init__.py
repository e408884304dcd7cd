"""Embeddings, scores of pairs of texts, and classes of texts: from requests to the engine and back."""
