"""Token streams in memory, read as a TokenStream is."""

import numpy as np

END = 0


class Stream:
    name = "train"

    def __init__(self, tokens, name="train"):
        self.tokens, self.num_tokens, self.name = np.asarray(tokens, np.int32), len(tokens), name

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return self.tokens[start:stop].copy()


def documents(lengths):
    """(a stream of documents of these lengths, the END of each included, in which no other token is twice; their offsets)"""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1)
    tokens[offsets[1:] - 1] = END
    return Stream(tokens), offsets
