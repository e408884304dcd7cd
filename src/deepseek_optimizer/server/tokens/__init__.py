"""Prompts and texts as tokens: tokenising in worker processes, lengths of prompts, the text of single tokens."""
