"""Transformers' own tests, run on optimised and on plain models: `make test-conformance`.

`source.py` downloads the tests of the installed version, `stage.py` arranges them and adds missing modules, `plugin.py`
optimises the models that they create, `compare.py` reports deviations, `exceptions.py` lists the allowed ones, and `run.py` is
the command.
"""
