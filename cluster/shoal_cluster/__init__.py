"""The server side of Shoal: shards, replicas, the durable protocol, and the actors."""

__version__ = "0.1.0"
