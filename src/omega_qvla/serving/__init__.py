"""A policy behind a socket, for robots and simulators elsewhere."""
