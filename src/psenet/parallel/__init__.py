"""Running several subnets in one pass."""
