"""generate() on an execution plan: steps, cache, checks, drafts, saved prefixes."""
