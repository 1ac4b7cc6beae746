"""The native backend of the CPU: packs run on integer instructions (csrc/, `kernels._native`).

A layer is repacked once for the instruction set of this CPU; a call is one parallel region
that transforms, rounds and multiplies. Threads: as many as `torch.get_num_threads()`.
What the compiled part leaves to torch: the output rotation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from omega_qvla.errors import BackendError
from omega_qvla.kernels import arithmetic
from omega_qvla.kernels.prologue import dense_blocks
from omega_qvla.kernels.registry import Capabilities, Kernel, StepLike, table_row
from omega_qvla.kernels.rows import compiled
from omega_qvla.numerics.hadamard import base_matrix, split_width
from omega_qvla.numerics.layer import QuantizedLayer

if TYPE_CHECKING:
    from omega_qvla.kernels import _native

_KINDS = frozenset({"per_token", "per_token_group", "per_step_tensor", "per_step_group"})
# Scales may change only between vectors of 16 inputs (csrc/layout.hpp).
_GROUP_MULTIPLE = 16
_MEND = (
    "the native kernels were not built when omega-qvla was installed; install a C++ compiler "
    "and Python's headers (apt-get install g++ python3-dev), then install omega-qvla again"
)
# Layers by number: what a compiled graph can carry in place of the layer itself.
_LAYERS: WeakValueDictionary[int, NativeLayer] = WeakValueDictionary()
_NUMBERS = itertools.count()


class NativeBackend:
    """Integer kernels on the CPU.

    isa: an instruction set from `isa_names`, for comparisons; "" takes the fastest here.
    """

    name = "native"

    def __init__(self, isa: str = "") -> None:
        self._isa = isa

    def capabilities(self) -> Capabilities:
        """The kinds whose scales leave the sum, with 4 and 8 bits, on the CPU."""
        return Capabilities(
            self.name,
            native=True,
            activation_kinds=_KINDS,
            activation_bits=frozenset({4, 8}),
            devices=frozenset({"cpu"}),
            isa=isa_names(),
            group_multiple=_GROUP_MULTIPLE,
            signed_activations=True,
        )

    def available(self) -> tuple[bool, str]:
        """Whether it was built and this CPU has the instructions asked for."""
        names = isa_names()
        if not names:
            return False, _MEND
        if self._isa and self._isa not in names:
            return False, f"this CPU or build has no {self._isa}, only {', '.join(names)}"
        return True, f"uses {self._isa or names[0]} of {', '.join(names)}"

    def prepare(self, layer: QuantizedLayer, device: torch.device) -> Kernel:
        """(x [..., in], step) -> y [..., out] in the dtype of x; see `NativeLayer`.

        Raises:
            BackendError: not available here, or not on the CPU, or a scheme it does not run.
        """
        available, why = self.available()
        obstacle = None if available else why
        if obstacle is None and device.type != "cpu":
            obstacle = f"it does not run on {device.type}"
        obstacle = obstacle or self.capabilities().obstacle(layer.scheme)
        if obstacle is not None:
            raise BackendError(f"layer {layer.name}: backend {self.name!r}: {obstacle}")
        return NativeLayer(layer.to(device), self._isa)


def isa_names() -> tuple[str, ...]:
    """Instruction sets with a path that runs on this machine, fastest first; () if unbuilt."""
    module = compiled()
    return () if module is None else tuple(module.isa_names())


class NativeLayer:
    """One layer, ready to run: called with (x [..., in], step), returns y [..., out]."""

    def __init__(self, layer: QuantizedLayer, isa: str = "") -> None:
        self.name, self.num_steps = layer.name, layer.num_steps
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._static = layer.scheme.activation.static
        self._linear = _repack(layer, isa)
        _register_operator()
        self._undo: Callable[[Tensor], Tensor] | None = None
        self._bias: Tensor | None = None  # where it cannot be added before
        if layer.output_rotation is not None:
            self._undo = dense_blocks(layer.output_rotation.float(), layer.out_features)
            self._bias = layer.bias
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    @property
    def nbytes(self) -> int:
        """Bytes of the repacked layer."""
        return self._linear.nbytes

    @property
    def linear(self) -> _native.Linear | None:
        """The compiled layer, where nothing is left to do after it."""
        return self._linear if self._undo is None else None

    def row(self, step: StepLike | None) -> int:
        """Row of the static table, 0 without one. Raises StepError outside its steps."""
        return table_row(self, step) if self._static else 0

    def __call__(self, x: Tensor, step: StepLike | None) -> Tensor:
        """Raises StepError outside the steps of a static table."""
        row = self.row(step)
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.omega_qvla.native_linear(x, self.number, row, self.out_features)
            return y
        return self.run(x, row)

    def run(self, x: Tensor, row: int) -> Tensor:
        """x [..., in] with the static scales of table row `row` (0 where there are none)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise BackendError(
                f"layer {self.name}: integer kernels have no gradient; run under "
                "torch.inference_mode() or take the emulated backend"
            )
        if x.shape[-1] != self.in_features or not x.is_cpu:
            raise BackendError(
                f"layer {self.name} takes [..., {self.in_features}] on the CPU, not "
                f"{list(x.shape)} on {x.device}"
            )
        plain = x.dtype == torch.float32
        source = x if plain and x.is_contiguous() else x.to(torch.float32).contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        rows = y.numel() // self.out_features
        self._linear.run(source.data_ptr(), rows, y.data_ptr(), row, torch.get_num_threads())
        if self._undo is not None:
            y = self._undo(y.view(-1, self.out_features)).view(y.shape)
            y = y if self._bias is None else y + self._bias
        return y if plain else y.to(x.dtype)

    def quantize(self, x: Tensor, row: int = 0) -> tuple[Tensor, Tensor]:
        """x [n, in] -> (q int8 [n, in], scale [n, groups]): what the product is made of."""
        x = x.to(torch.float32).contiguous()
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(x.shape[0], self._linear.groups)
        self._linear.quantize(x.data_ptr(), x.shape[0], row, q.data_ptr(), scale.data_ptr())
        return q, scale


def _repack(layer: QuantizedLayer, isa: str) -> _native.Linear:
    module = compiled()
    assert module is not None  # `NativeBackend.prepare` has looked
    activation, rotation = layer.scheme.activation, layer.scheme.rotation
    grouped = activation.kind in ("per_token_group", "per_step_group")
    width = layer.in_features
    group = layer.scheme.weight.group
    kind, base, matrix = _rotation(layer)
    linear: _native.Linear = module.Linear(
        qweight=layer.qweight.contiguous(),
        inputs=width,
        weight_scale=layer.weight_scale.float().contiguous(),
        weight_group=0 if group is None else group,
        bias=None if layer.output_rotation is not None else layer.bias,
        multiplier=_multiplier(layer),
        permutation=None if layer.permutation is None else layer.permutation.contiguous(),
        rotation=kind,
        block=rotation.block,
        matrix=matrix,
        base=base,
        bits=activation.bits,
        clip=activation.clip,
        signed_scales=activation.signed,
        act_group=activation.group if grouped else 0,
        table=_float(layer.act_scale),
        rank=layer.scheme.weight.rank,
        lowrank_a=_float(layer.lowrank_a),
        lowrank_b=_float(layer.lowrank_b),
        isa=isa,
    )
    return linear


def _rotation(layer: QuantizedLayer) -> tuple[str, int, Tensor | None]:
    """(kind as the kernels call it, order of the odd factor, matrix) of a layer's rotation."""
    kind = layer.scheme.rotation.kind
    if kind == "full_hadamard":
        factors = split_width(layer.in_features)
        assert factors is not None  # the layer was built with this width
        return kind, factors[0], base_matrix(factors[0]).float()
    if layer.rotation is not None:
        return "dense", 1, layer.rotation.float().contiguous()
    return kind, 1, None


def _multiplier(layer: QuantizedLayer) -> Tensor | None:
    """`arithmetic.multiplier` in the order after the permutation, as the kernels take it."""
    factor = arithmetic.multiplier(layer)
    if factor is not None and layer.permutation is not None:
        factor = factor[layer.permutation.long()]
    return None if factor is None else factor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


@cache
def _register_operator() -> None:
    """`omega_qvla::native_linear`, so that torch.compile keeps its graph whole."""

    @torch.library.custom_op("omega_qvla::native_linear", mutates_args=())
    def native_linear(x: Tensor, number: int, row: int, out_features: int) -> Tensor:
        return _LAYERS[number].run(x, row)

    @native_linear.register_fake
    def _(x: Tensor, number: int, row: int, out_features: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)
