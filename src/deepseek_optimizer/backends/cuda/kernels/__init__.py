"""Triton's kernels, each file with the kernels of one purpose and the functions that launch them.

Launching functions take tensors on the plan's device and check nothing: the plan has checked the graph and the step. Triton is
imported here and in no file outside this folder.
"""
