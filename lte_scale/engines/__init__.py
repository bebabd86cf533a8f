"""What shards the base: one small interface, one file per engine."""
