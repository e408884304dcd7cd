"""An OpenAI-compatible HTTP server for the engine. Needs the extra `serve`: pip install "deepseek-optimizer[serve]"."""
