"""The command line, `dso` and `deepseek-optimizer`: one command per file.

A package next to `deepseek_optimizer` rather than inside it: importing that package registers it with Transformers and so loads
torch, which takes seconds. Commands import it inside their functions, so that `--help` answers at once.
"""
