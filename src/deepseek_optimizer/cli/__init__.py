"""The command line: `dso` and `deepseek-optimizer`. One file a command; torch and Transformers load where one needs them."""
