"""Training of Transformers models on machines with little memory; see `docs/training.md`."""
