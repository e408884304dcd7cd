"""Memory for the cache: how much it may take, and how it grows."""
