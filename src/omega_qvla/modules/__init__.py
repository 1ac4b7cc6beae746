"""Modules that a quantized policy is made of."""
