"""From a request with messages or a prompt to the engine's request, and from its tokens to an answer."""
