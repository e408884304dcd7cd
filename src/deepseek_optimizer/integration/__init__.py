"""All code that depends on Transformers' internals; a new release of Transformers affects only this folder."""
