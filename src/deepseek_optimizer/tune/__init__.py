"""Finds settings for a model on a machine by replaying requests: `dso tune`."""
