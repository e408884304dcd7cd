"""Connections, bodies, keys, queues and metrics: what every route needs, whatever it serves."""
