"""Connections, request bodies, keys, queues and metrics, used by all routes."""
