"""`python -m deepseek_optimizer` is `dso`."""

from deepseek_optimizer_cli.app import main

main()
