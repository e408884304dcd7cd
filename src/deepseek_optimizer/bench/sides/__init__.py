"""Sides of a comparison: scripts that measure one model in one engine, and print their figures as the last line, in JSON.

    {"load_s", "to_first_token_s", "memory_bytes" (peak above what was resident before loading),
     "runs": [{"prompt", "batch", "times", "generated"}, ...]}      as `bench.runs.Run`; figures are made by who reads them

A script that another environment runs (an engine that is not installed here) imports nothing of this package; what those
share is in `foreign.py`, which lies beside them.
"""
