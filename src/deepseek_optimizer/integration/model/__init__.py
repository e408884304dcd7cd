"""What an optimised model does in place of its class's methods: forward, save, resize, adapters, report."""
