"""`generate` on an execution plan: steps, cache, checks, speculative decoding, saved prefixes."""
