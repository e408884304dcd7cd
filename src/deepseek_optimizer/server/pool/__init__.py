"""Several models in one server: loaded when a request names them, and unloaded when others need the memory."""
