"""Loads and packs optimized models: `load_model`, `from_pretrained`, calibration."""
