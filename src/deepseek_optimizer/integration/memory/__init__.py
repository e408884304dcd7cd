"""Memory of the KV cache: its maximum size and its growth."""
