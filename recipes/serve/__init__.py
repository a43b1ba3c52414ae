"""A service: several adapters and instructions in one process, with streaming."""
