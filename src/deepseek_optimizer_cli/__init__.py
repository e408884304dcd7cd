"""The command line: `dso` and `deepseek-optimizer`, one file a command.

A package beside `deepseek_optimizer`, not in it: importing that registers it with Transformers and so loads torch, which takes
seconds. Here commands import it when they need it, and help is there at once.
"""
