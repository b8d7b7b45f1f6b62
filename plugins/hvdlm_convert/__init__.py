"""The command `convert`: merges the shards of a checkpoint into one file."""
