"""Sides of a comparison: scripts that measure one model in one engine and print the results as JSON on the last line.

    {"load_s", "to_first_token_s", "memory_bytes" (peak above what was resident before loading),
     "runs": [{"prompt", "batch", "times", "generated"}, ...]}      as `bench.runs.Run`; the caller computes the figures

`model.py` adds "own_read_gb_s" on request: how fast its threads read its weights where they are in memory, measured after every
fourth token; the median. The speed of memory may change within seconds, and differ from place to place.

Scripts for another environment (an engine that is not installed here) do not import this package; they share `foreign.py`,
which is in the same directory.
"""
