"""From files to an optimised model, and back: load_model, from_pretrained, packing, calibration."""
