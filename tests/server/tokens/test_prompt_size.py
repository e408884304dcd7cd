"""The size of prompts, before they are tokenized. `test_fairness.py` tests the bound on a token's bytes."""

from __future__ import annotations

from deepseek_optimizer.server.tokens.prompt_size import too_long


def test_clients_of_all_servers_recognize_a_prompt_that_is_too_long():
    message = too_long(10, 11, "at least ")
    assert message.startswith("This model's maximum context length is 10 tokens")  # OpenAI
    assert "too large" in message  # llama-server
    assert "Please reduce the length of the input prompt" in message  # vLLM
    assert "at least 11" in message
