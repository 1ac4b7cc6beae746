"""How the tensors that a pack leaves are stored in a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from omega_qvla.errors import BundleError

Precision = Literal["keep", "bfloat16", "float16"]
Weights = Literal["keep", "int8"]


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle changes of the tensors that its pack leaves. The defaults change nothing.

    rest: dtype of the floating-point tensors; `keep` is the checkpoint's own.
    embed: `int8` stores the embedding table in 8 bits with one scale per row.
    vision: `int8` does so with the linear layers of the vision tower.
    connector: `int8` does so with those between the backbone and the action head (the image
        projection; GR00T's vl_self_attention).
    bake_steps: store the outputs of the layers that read the denoising time alone, for this
        number of steps, in place of the layers. The policy then runs with this number only.
    """

    rest: Precision = "keep"
    embed: Weights = "keep"
    vision: Weights = "keep"
    connector: Weights = "keep"
    bake_steps: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("rest", Precision), *((n, Weights) for n in EIGHT_BIT)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise BundleError(f"{name} {value!r}; one of {', '.join(get_args(known))}")
        steps = self.bake_steps
        if steps is not None and (type(steps) is not int or steps < 1):
            raise BundleError(f"bake_steps must be a positive number, got {steps!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BundleOptions:
        """The inverse of `dataclasses.asdict`. Raises BundleError on unknown keys."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(data) != names:
            raise BundleError(f"options {sorted(data)}; expected {sorted(names)}")
        return cls(**data)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of `rest`, None where the checkpoint's is kept."""
        return None if self.rest == "keep" else getattr(torch, self.rest)

    @property
    def lossy(self) -> tuple[str, ...]:
        """The options that may change actions."""
        names = ("rest", *EIGHT_BIT)
        return tuple(name for name in names if getattr(self, name) != "keep")


EIGHT_BIT = ("embed", "vision", "connector")
