"""The floor: vocabulary, configuration, corpora, recipes and the shard format."""
