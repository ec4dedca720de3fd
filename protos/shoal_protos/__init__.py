"""What travels between Shoal's processes: the public gRPC messages and the link's frames."""
