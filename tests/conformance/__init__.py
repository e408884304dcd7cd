"""Transformers' own tests, run on optimised models beside plain ones: `make test-conformance`.

`source.py` fetches them by the installed version, `stage.py` lays them out with what they lack, `plugin.py` optimises the
models that they make, `compare.py` says what deviates, `exceptions.py` lists what may, `run.py` is the command.
"""
