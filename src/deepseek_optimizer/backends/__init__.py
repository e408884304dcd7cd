"""Backends, which compile and run graphs with the same results. `base.py` defines the interface that each implements."""
