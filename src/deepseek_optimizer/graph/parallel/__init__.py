"""One model over several processes: which part of a graph and of its weights each of them has."""

from .parallel import Parallel

__all__ = ["Parallel"]
