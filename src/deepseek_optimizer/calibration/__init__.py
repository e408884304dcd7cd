"""Calibration: measures a model on a sample text to choose rounding and formats before its weights are quantized."""
