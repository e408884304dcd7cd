"""A model that several processes run together: the leader's backend, and what the other processes do."""

from .backend import RankBackend
from .commands import OwnPart
from .leader import Leader
from .links import Links
from .stage_worker import serve_stage
from .stages import StageBackend
from .worker import serve

__all__ = ["Leader", "Links", "OwnPart", "RankBackend", "StageBackend", "serve", "serve_stage"]
