"""Talking to a model: text streamed token by token, one answer with its timings, a history of turns."""
