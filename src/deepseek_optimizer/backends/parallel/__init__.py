"""A model that several processes run together: the leader's backend, and what the other processes do."""

from .backend import RankBackend
from .leader import Leader
from .worker import serve

__all__ = ["Leader", "RankBackend", "serve"]
