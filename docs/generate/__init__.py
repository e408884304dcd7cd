"""Generates the parts of the documentation that repeat what the code says: reference pages and the table of models."""
