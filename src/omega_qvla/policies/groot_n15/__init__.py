"""GR00T N1.5 in plain PyTorch."""
