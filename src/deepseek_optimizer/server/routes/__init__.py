"""What the server answers: one file a route, or a few that belong together. Each has `add(app, state)`."""
