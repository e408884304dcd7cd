"""Methods of an optimised model that replace those of its class: forward, save, resize, adapters, report."""
