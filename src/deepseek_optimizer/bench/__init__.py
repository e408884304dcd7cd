"""Measuring: each side in a process of its own, sides in turns, medians."""
