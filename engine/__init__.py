"""The data engine: recordings in, UCS-tagged shards out."""
