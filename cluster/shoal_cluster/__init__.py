"""The server side of Shoal: shards, replicas, the durable protocol and the actors that host them."""
