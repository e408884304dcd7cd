"""Which models are supported, how, and the memory that well-known ones need: for `dso models` and the documentation."""
