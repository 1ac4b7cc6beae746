"""What calibration remembers of one layer's inputs: enough to quantize it, never all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.errors import CalibrationError
from omega_qvla.numerics.symmetric import all_finite


@dataclass(frozen=True)
class LayerStats:
    """Statistics of the input of one linear layer, before any transform.

    hessian: [in, in] float32, X^T X / n over all tokens seen.
    profile: [in], rms of the tokens after each was divided by its own rms (robust profile).
    tokens: per denoising step a sample [n_s, in] of tokens; one entry for a layer that runs
        outside the denoising steps.
    count: how many tokens the Hessian and the profile summarise.
    """

    hessian: Tensor
    profile: Tensor
    tokens: tuple[Tensor, ...]
    count: int

    def check(self, name: str, in_features: int, num_steps: int | None) -> None:
        """Raise CalibrationError unless usable for layer `name` of that width and steps."""
        if self.count < 1:
            raise CalibrationError(f"layer {name}: calibration saw no token")
        if tuple(self.hessian.shape) != (in_features, in_features):
            raise CalibrationError(
                f"layer {name}: Hessian {tuple(self.hessian.shape)} for {in_features} inputs; "
                "this calibration belongs to another checkpoint"
            )
        if tuple(self.profile.shape) != (in_features,):
            raise CalibrationError(f"layer {name}: profile of shape {tuple(self.profile.shape)}")
        if not (all_finite(self.hessian) and bool(torch.isfinite(self.profile).all())):
            raise CalibrationError(f"layer {name}: calibration statistics are not finite")
        steps = 1 if num_steps is None else num_steps
        if len(self.tokens) != steps:
            raise CalibrationError(
                f"layer {name}: calibrated for {len(self.tokens)} step(s), needs {steps}"
            )
        for index, tokens in enumerate(self.tokens):
            if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] != in_features:
                raise CalibrationError(
                    f"layer {name}: step {index} has no calibration tokens "
                    f"(shape {tuple(tokens.shape)}); calibrate with every denoising step"
                )
            if not bool(torch.isfinite(tokens).all()):
                raise CalibrationError(f"layer {name}: step {index} has non-finite tokens")

    def to(self, device: torch.device) -> LayerStats:
        """The same statistics on `device`."""
        tokens = tuple(sample.to(device) for sample in self.tokens)
        return LayerStats(self.hessian.to(device), self.profile.to(device), tokens, self.count)
