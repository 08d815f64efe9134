"""From documents to a directory of token shards and an index."""
