"""One quantized linear layer: hardware-neutral tensors, exactly those that a pack stores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla.config.recipe import Scheme
from omega_qvla.errors import NumericsError
from omega_qvla.numerics.duquant import shared_block
from omega_qvla.numerics.packing import unpack_int4
from omega_qvla.numerics.qparams import group_count
from omega_qvla.numerics.rotation import block_sizes
from omega_qvla.numerics.transform import InputTransform


@dataclass(frozen=True)
class QuantizedLayer:
    """Everything one quantized linear layer needs.

    At run time: x / smooth -> first rotation -> permutation -> rotation -> quantize ->
    integer product with qweight -> scales -> + low rank -> undo output rotation -> + bias.

    num_steps: denoising steps it was calibrated for; None for a layer outside them.
    qweight: uint8 [out, ceil(in / 2)], see `numerics.packing`; int8 [out, in] for 8 bits;
    f16 [out, in] for 16, the weight itself, with the gain of each row as its scale.
    weight_scale: f16 [out, groups], of either sign where weights are `signed`.
    bias: f32 [out]. smooth: f16 [in].
    permutation: int32 [in]. rotation: f16 [n_blocks, B, B], svd kinds;
    [1, B, B], used for every B channels, `duquant`, which has a first_rotation f16 [1, B, B]
    before its permutation too. signs: int8 [in],
    randomized Hadamard kinds. output_rotation: f16 [n_blocks, B, B].
    act_scale: f32 [steps, 1 | groups | in] for static kinds; one row outside the steps.
    lowrank_a, lowrank_b: f16 [out, r] and [in, r].

    Raises:
        NumericsError: at construction, when a tensor's shape or dtype does not fit, one that
            the scheme needs is missing, or holds what would silently spoil every result: a
            scale that is not positive (zero, where weights are `signed`), a value that is not
            finite, a permutation that is none.
    """

    name: str
    side: str
    in_features: int
    out_features: int
    scheme: Scheme
    num_steps: int | None
    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    smooth: Tensor | None = None
    permutation: Tensor | None = None
    rotation: Tensor | None = None
    signs: Tensor | None = None
    output_rotation: Tensor | None = None
    act_scale: Tensor | None = None
    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    first_rotation: Tensor | None = None

    def __post_init__(self) -> None:
        expected = expected_tensors(self)
        for name, (shape, dtype) in expected.items():
            value = getattr(self, name)
            if value is None and name == "bias":
                continue
            if value is None or tuple(value.shape) != shape or value.dtype != dtype:
                found = "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise NumericsError(
                    f"layer {self.name}: {name} must be {dtype} {shape}, found {found}"
                )
        for name in TENSOR_FIELDS:
            if getattr(self, name) is not None and name not in expected:
                raise NumericsError(f"layer {self.name}: its scheme has no use for {name}")
        for name, value in self.tensors().items():
            fault = _fault(name, value, self.scheme.weight.signed)
            if fault is not None:
                raise NumericsError(f"layer {self.name}: {name} {fault}")

    @property
    def transform(self) -> InputTransform:
        """The change of basis of its input."""
        return InputTransform(
            self.scheme.rotation,
            self.smooth,
            self.permutation,
            self.rotation,
            self.signs,
            self.first_rotation,
        )

    def integers(self) -> Tensor:
        """The weight's integers, int8 [out, in]; of 16 bits the weight itself, f16."""
        if self.scheme.weight.bits >= 8:
            return self.qweight
        return unpack_int4(self.qweight, self.in_features)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        values = {name: getattr(self, name) for name in TENSOR_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> QuantizedLayer:
        """The same layer with its tensors on `device`."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


def _fault(name: str, value: Tensor, signed_weights: bool) -> str | None:
    """What is wrong with the values of a tensor of the right shape and dtype, in words."""
    if name == "weight_scale" and signed_weights:
        good = bool((torch.isfinite(value) & (value != 0)).all())
        return None if good else "is zero or not finite"
    if name in ("weight_scale", "smooth", "act_scale"):
        good = bool((torch.isfinite(value) & (value > 0)).all())
        return None if good else "is not finite and positive"
    if name == "permutation":
        order = torch.arange(len(value), dtype=value.dtype, device=value.device)
        return None if torch.equal(value.sort().values, order) else "is none"
    if name == "signs":
        return None if bool((value.abs() == 1).all()) else "are not +-1"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "is not finite"
    return None


TENSOR_FIELDS: tuple[str, ...] = tuple(
    field.name for field in dataclasses.fields(QuantizedLayer) if "Tensor" in str(field.type)
)


def act_scale_shape(scheme: Scheme, in_features: int, num_steps: int | None) -> tuple[int, int]:
    """[steps, scales per step] of a static activation table."""
    width = {
        "per_step_tensor": 1,
        "per_step_group": group_count(in_features, scheme.activation.group),
        "per_step_channel": in_features,
    }[scheme.activation.kind]
    return (1 if num_steps is None else num_steps, width)


def expected_tensors(layer: QuantizedLayer) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that the layer's scheme calls for (bias may be absent)."""
    scheme, rows, width = layer.scheme, layer.out_features, layer.in_features
    block = scheme.rotation.block
    half = torch.float16
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": {8: ((rows, width), torch.int8), 16: ((rows, width), half)}.get(
            scheme.weight.bits, ((rows, -(-width // 2)), torch.uint8)
        ),
        "weight_scale": ((rows, group_count(width, scheme.weight.group)), half),
        "bias": ((rows,), torch.float32),
    }
    if scheme.smoothing is not None:
        expected["smooth"] = ((width,), half)
    if scheme.rotation.kind == "duquant":
        size = shared_block(width, block)
        expected["first_rotation"] = expected["rotation"] = ((1, size, size), half)
    if scheme.permutation or scheme.rotation.kind == "duquant":
        expected["permutation"] = ((width,), torch.int32)
    if scheme.rotation.kind in ("svd", "svd_hadamard"):
        expected["rotation"] = ((len(block_sizes(width, block)), block, block), half)
    if scheme.rotation.randomized and scheme.rotation.kind in ("hadamard", "full_hadamard"):
        expected["signs"] = ((width,), torch.int8)
    if scheme.output_rotation:
        expected["output_rotation"] = ((len(block_sizes(rows, block)), block, block), half)
    if scheme.activation.static:
        shape = act_scale_shape(scheme, width, layer.num_steps)
        expected["act_scale"] = (shape, torch.float32)
    if scheme.weight.rank:
        expected["lowrank_a"] = ((rows, scheme.weight.rank), half)
        expected["lowrank_b"] = ((width, scheme.weight.rank), half)
    return expected
