"""A replica: a process of Ray that runs the server's application with its own engine."""

from __future__ import annotations

import logging
from typing import Any

from ..engine.core import EngineCore
from ..server.app import create_app
from ..server.loading import load_served_model
from ..server.served_model import ServedModel
from ..server.settings import ServerSettings
from ..server.state import ServerState
from ..system.interpreter import switch_often
from .proxy import note_replica
from .ranks import start_ranks

logger = logging.getLogger("deepseek_optimizer.ray")


class Replica:
    """The class that `deployment` deploys. Ray calls its methods; `__serve_build_asgi_app__` gives Ray the application.

    Args:
        served: the model.
        settings: the server's. Ray's proxies accept the connections, so those about addresses and TLS have no effect.
        nodes: how many nodes the model is divided among.
    """

    def __init__(self, served: ServedModel, settings: ServerSettings, nodes: int = 1) -> None:
        from ray import serve

        switch_often()
        self._ranks = start_ranks(served, settings, nodes) if nodes > 1 else []
        self.engine, settings, _, facts = load_served_model(served, settings, logger.warning)
        self._app = create_app(self.engine, settings)
        self._state: ServerState = self._app.state.server
        self._state.warm_up()
        self._name = serve.get_replica_context().replica_id.unique_id
        logger.info("%s: %s", self._name, facts)

    def __serve_build_asgi_app__(self) -> Any:
        """The application, whose responses name this replica."""
        return note_replica(self._app, self._name)

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises an error.

        Raises:
            EngineDeadError: the engine has stopped.
        """
        self.engine.check_alive()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray for `autoscaling.by_load`: the engine's gauges, those of `/metrics`."""
        core = self.engine.core
        running, waiting = core.load
        usage = core.cache_usage() if isinstance(core, EngineCore) else 0.0
        return {"running": float(running), "waiting": float(waiting), "cache_usage": float(usage)}
