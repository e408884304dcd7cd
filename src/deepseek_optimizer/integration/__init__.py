"""Every hook into Transformers, and the only place that touches its internals: a new release costs this folder."""
