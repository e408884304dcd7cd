"""Calibration: what a sample text tells about a model's weights, before they are quantised."""
