"""Uploaded files: receiving, reading and storing them, and preparing them for questions."""
