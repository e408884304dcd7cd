"""The server's routes: one file for a route or a few related ones. Each has a function `add(app, state)`."""
