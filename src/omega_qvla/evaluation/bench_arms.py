"""The ways to run one checkpoint that are compared: full precision, plain and hastened, and its
pack on each backend.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omega_qvla.errors import EvaluationError
from omega_qvla.pack.apply import Missing
from omega_qvla.policies.base import Policy
from omega_qvla.policies.groot_n15.dit import DiT
from omega_qvla.policies.groot_n15.qwen3 import Qwen3Model
from omega_qvla.policies.groot_n15.vl_self_attention import VLSelfAttention
from omega_qvla.policies.pi05.gemma import Expert, LanguageModel
from omega_qvla.policies.siglip import SiglipVisionModel
from omega_qvla.runtime.engine import Engine

#: Stacks that torch.compile takes whole.
_STACKS = (SiglipVisionModel, LanguageModel, Expert, Qwen3Model, VLSelfAttention, DiT)
FULL_PRECISION = ("fp32", "control", "bf16", "fp32 compiled")


@dataclass(frozen=True)
class BenchArm:
    """One way to run a policy.

    kind: one of `FULL_PRECISION` or the name of a backend that runs the pack.
        fp32           plain PyTorch
        control        full precision on the very graph that the pack runs on: the same compiled
                       norms, gates and attention, the same product for unquantized layers
        bf16           plain PyTorch in bfloat16
        fp32 compiled  plain PyTorch under torch.compile
    """

    kind: str

    @property
    def quantized(self) -> bool:
        """Whether it runs the pack."""
        return self.kind not in FULL_PRECISION

    def load(
        self,
        checkpoint: str | os.PathLike[str],
        pack: str | os.PathLike[str] | None,
        device: str = "cpu",
        *,
        act_bits: int | None = None,
        missing: Missing = "fallback",
        **reading: Any,
    ) -> Engine:
        """The policy ready to run.

        Args:
            act_bits, missing: of the pack, as of `Engine.load`.
            reading: how `Engine.load` reads the checkpoint (settings, tokenizer, ...).

        Raises:
            EvaluationError: the arm runs a pack, and none was given.
        """
        if self.quantized:
            if pack is None:
                raise EvaluationError(f"arm {self.kind!r} runs a pack, and none was given")
            return Engine.load(
                checkpoint,
                pack,
                backend=self.kind,
                device=device,
                act_bits=act_bits,
                missing=missing,
                **reading,
            )
        dtype = torch.bfloat16 if self.kind == "bf16" else torch.float32
        fast = self.kind == "control"
        engine = Engine.load(checkpoint, device=device, dtype=dtype, fast=fast, **reading)
        if self.kind == "fp32 compiled":
            compile_stacks(engine.policy.module)
        return engine


def compile_stacks(module: nn.Module) -> None:
    """torch.compile every transformer stack inside `module` as one graph, in place."""
    for part in module.modules():
        if isinstance(part, _STACKS):
            part.compile(dynamic=False)


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def vision_of(policy: Policy) -> nn.Module:
    """The policy's image encoder. Raises EvaluationError."""
    for part in policy.module.modules():
        if isinstance(part, SiglipVisionModel):
            return part
    raise EvaluationError(f"the {policy.family} policy has no image encoder that is known here")
