"""Responses that are stored for later requests, in SQLite."""
