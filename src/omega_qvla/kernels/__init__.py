"""What runs a quantized layer: the oracle, the backends, and the choice between them."""
