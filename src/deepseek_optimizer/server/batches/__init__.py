"""Batches: files of requests that a server answers when it has time, OpenAI's /v1/batches."""
