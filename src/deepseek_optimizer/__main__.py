"""`python -m deepseek_optimizer` is `dso`."""

from .cli.app import main

main()
