"""Pure tensor functions of the quantization: no files, no models, no state.

Import the submodules directly (`from omega_qvla.numerics.hadamard import fwht`).
"""
