"""`python -m deepseek_optimizer` runs `dso`."""

from deepseek_optimizer_cli.app import main

main()
