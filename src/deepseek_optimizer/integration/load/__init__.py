"""Loads and packs optimised models: `load_model`, `from_pretrained`, calibration."""
