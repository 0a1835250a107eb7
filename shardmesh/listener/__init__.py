"""A node that holds one shard: control process, data process, scheduler."""
