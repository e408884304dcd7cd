"""Tokenizing on separate threads, early checks of prompt lengths, and the text of single tokens."""
