"""Policies: the two model families, their processors, checkpoints and quantization sites."""
