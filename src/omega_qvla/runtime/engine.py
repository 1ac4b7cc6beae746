"""Engine: a checkpoint and a pack in, checked action chunks out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from omega_qvla.bundle.manifest import is_bundle
from omega_qvla.bundle.reader import load_bundle
from omega_qvla.errors import ActionError, BundleError, ConfigError
from omega_qvla.pack.apply import ApplyReport, Missing, apply_pack
from omega_qvla.pack.reader import read_pack
from omega_qvla.policies.base import Policy, check_actions
from omega_qvla.policies.hasten import hasten
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import load_policy
from omega_qvla.runtime.recorder import Recorder


class Engine:
    """A policy ready to act, quantized or not.

    Attributes:
        policy: the policy, its linears replaced if there is a pack.
        report: what runs it, or None in full precision.
        recorder: keeps what `infer` is given and gives; None (the default) keeps nothing. Who
            sets it closes it, and tells it where episodes begin.
    """

    def __init__(
        self,
        policy: Policy,
        report: ApplyReport | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.policy = policy
        self.report = report
        self.recorder = recorder

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        pack: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        act_bits: int | None = None,
        missing: Missing = "fallback",
        fast: bool = True,
        settings: Mapping[str, Any] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        offline: bool = False,
        cache: Path | None = None,
    ) -> Self:
        """Load a bundle, or a checkpoint directory and, if given, put its pack in place.

        The pack is read and proved before the (larger) checkpoint is touched.

        Args:
            act_bits, missing: as of `apply_pack`.
            fast: prepare the policy for inference (`policies.hasten`): its weights must not
                change afterwards.
            settings, tokenizer, revision, offline, cache: as of `load_policy`; a bundle needs
                and takes neither settings nor a tokenizer.

        Raises:
            BundleError: a file of the bundle is missing, truncated or altered; or a pack,
                settings or a tokenizer are given besides.
            ConfigError: `act_bits` without a pack that they could be the bits of.
            CheckpointError: the checkpoint is incomplete or of no known family.
            PackError: the pack is damaged or of another checkpoint.
            BackendError: `backend` cannot run the pack here.
        """
        if is_bundle(checkpoint):
            if pack is not None:
                raise BundleError(f"{os.fspath(checkpoint)} is a bundle, which holds its pack")
            if settings or tokenizer:
                raise BundleError(
                    f"{os.fspath(checkpoint)} is a bundle, which has its own settings and "
                    "tokenizer: leave them out, or bundle anew with others"
                )
            engine = cls(
                *load_bundle(checkpoint, backend, device, dtype, act_bits=act_bits, missing=missing)
            )
        else:
            if pack is None and act_bits is not None:
                raise ConfigError("act_bits are of a pack's activations, and there is no pack")
            read = None if pack is None else read_pack(pack)
            policy = load_policy(
                checkpoint,
                device=device,
                dtype=dtype,
                settings=settings,
                tokenizer=tokenizer,
                revision=revision,
                offline=offline,
                cache=cache,
            )
            report = None
            if read is not None:
                report = apply_pack(policy, read, backend, act_bits=act_bits, missing=missing)
            engine = cls(policy, report)
        if fast:
            hasten(engine.policy)
        return engine

    @property
    def backend(self) -> str:
        """Name of the backend of the quantized layers; "none" in full precision."""
        return "none" if self.report is None else self.report.backend

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names that `Observation.images` must have."""
        return self.policy.cameras

    def infer(
        self, observation: Observation, *, seed: int = 0, noise: Tensor | None = None
    ) -> np.ndarray:
        """One action chunk, float32 [H, action_dim] in raw units.

        Args:
            observation: raw images, state and instruction.
            seed: of the noise, where `noise` is not given.
            noise: [H, A], standard normal.

        Raises:
            ObservationError: the observation does not fit the policy.
            ActionError: the chunk has a wrong shape or a value that is not finite.
        """
        actions = self.policy.infer(observation, seed=seed, noise=noise)
        expected = (self.policy.action_horizon, self.policy.action_dim)
        if actions.shape != expected:
            raise ActionError(f"the policy produced actions {actions.shape}, expected {expected}")
        check_actions(actions)
        if self.recorder is not None:
            self.recorder.record(observation, actions)
        return actions
