"""Tests of other servers, unchanged, against `dso serve`: `python -m peers.run`.

The files are taken from the source distributions of vLLM and of llama-cpp-python, which contains llama.cpp. Only what their
tests use as fixtures is replaced: the process that they start, the models, and values that belong to a model, such as a number
of tokens. `deviations.py` explains each test that does not pass.
"""
