"""A streamer for tests of `generate`."""

from transformers.generation.streamers import BaseStreamer


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True
