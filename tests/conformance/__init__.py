"""Transformers' own tests, run on optimized and on plain models: `make test-conformance`.

`source.py` downloads the tests of the installed version, `stage.py` arranges them and adds missing modules, `plugin.py`
optimizes the models that they create, `compare.py` reports deviations, `exceptions.py` lists the allowed ones, and `run.py` is
the command.
"""
