"""Conversion of API requests into requests for the engine, and of the engine's outputs into responses."""
