"""Methods of an optimized model that replace those of its class: forward, save, resize, adapters, report."""
