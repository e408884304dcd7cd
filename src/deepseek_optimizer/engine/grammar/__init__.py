"""Grammars that an answer must conform to."""
