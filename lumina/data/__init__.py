"""Documents -> token shards -> rows -> batches."""
