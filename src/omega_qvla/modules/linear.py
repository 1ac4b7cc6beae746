"""`QuantLinear`, which takes the place of `nn.Linear`, and the swap itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from omega_qvla.errors import PackError
from omega_qvla.kernels.registry import Backend, Kernel, resolve_backend
from omega_qvla.modules.shared import SharedProduct, groups_by_input
from omega_qvla.modules.step_context import current_step
from omega_qvla.numerics.layer import QuantizedLayer


class QuantLinear(nn.Module):
    """A quantized linear layer, run by `backend` on `device`.

    It has no parameters: the weights live in the backend's own layout, on `device` for good.
    Steps come from `denoising_step`; only a layer with a table of scales per step needs one.

    shared: the product that runs it together with layers of the same input, or None; place:
    which of that product's outputs is its own. Alone, such a layer runs them all.
    """

    def __init__(
        self,
        layer: QuantizedLayer,
        backend: Backend,
        device: torch.device | str = "cpu",
        shared: tuple[SharedProduct, int] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.side, self.scheme = layer.name, layer.side, layer.scheme
        self.backend = backend.name
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.shared: SharedProduct | None = None if shared is None else shared[0]
        self.place = 0 if shared is None else shared[1]
        self.kernel: Kernel | None = None
        if shared is None:
            self.kernel = backend.prepare(layer, torch.device(device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], dtype of x. Raises StepError outside its steps."""
        if self.kernel is None:
            assert self.shared is not None
            return self.shared(x)[self.place]
        return self.kernel(x, current_step())

    def extra_repr(self) -> str:
        weight, activation = self.scheme.weight, self.scheme.activation
        bits = 16 if activation.kind == "none" else activation.bits
        return (
            f"{self.in_features} -> {self.out_features}, w{weight.bits}a{bits} "
            f"{activation.kind}, {self.backend}"
        )


def replace_linears(
    module: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    backend: str | Backend = "auto",
    device: torch.device | None = None,
    together: Iterable[Sequence[str]] = (),
) -> Backend:
    """Swap every `nn.Linear` named in `layers` (qualified name in `module`) for its quantized
    self, in place, on `device`, or each on the device of the weight that it replaces (which
    for a network on the meta device would be nowhere).

    All names and shapes are checked before anything is swapped. Returns the backend.

    Args:
        together: names of layers that the network runs through `modules.shared.project` on
            one input. A native backend runs those that agree on its integers as one product.

    Raises:
        PackError: a name is missing, no nn.Linear, or of another shape.
        BackendError: the backend cannot run a layer.
    """
    found = {name: _find(module, name, layer) for name, layer in layers.items()}
    devices = {name: device or linear.weight.device for name, linear in found.items()}
    if isinstance(backend, str):
        first = next(iter(devices.values()), torch.device("cpu"))
        backend = resolve_backend(backend, layers.values(), first)
    shared = _shared(layers, backend, devices, together)
    quantized = {
        name: QuantLinear(layers[name], backend, devices[name], shared.get(name)) for name in found
    }
    for name, replacement in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, replacement)
    return backend


def _shared(
    layers: Mapping[str, QuantizedLayer],
    backend: Backend,
    devices: Mapping[str, torch.device],
    together: Iterable[Sequence[str]],
) -> dict[str, tuple[SharedProduct, int]]:
    """Layer name -> (the product that runs it, its place there), where it is not alone."""
    if not backend.capabilities().native:
        return {}
    found: dict[str, tuple[SharedProduct, int]] = {}
    for readers in together:
        for names in groups_by_input(layers, readers):
            if len({devices[name] for name in names}) > 1:
                continue
            product = SharedProduct.of(layers, names, backend, devices[names[0]])
            found |= {name: (product, i) for i, name in enumerate(names)}
    return found


@contextmanager
def quantized_linears(
    module: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    backend: str | Backend = "auto",
) -> Iterator[None]:
    """`replace_linears` for the length of a block; the linears come back after it."""
    originals = {name: _find(module, name, layer) for name, layer in layers.items()}
    if layers:
        replace_linears(module, layers, backend)
    try:
        yield
    finally:
        for name, linear in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, linear)


def _find(module: nn.Module, name: str, layer: QuantizedLayer) -> nn.Linear:
    try:
        linear = module.get_submodule(name)
    except AttributeError as error:
        raise PackError(f"the policy has no layer {name}: this pack is of another one") from error
    if not isinstance(linear, nn.Linear):
        raise PackError(f"layer {name} is a {type(linear).__name__}, not a plain nn.Linear")
    if (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
        raise PackError(
            f"layer {name} is {linear.in_features} -> {linear.out_features} in the policy and "
            f"{layer.in_features} -> {layer.out_features} in the pack"
        )
    return linear


def quantized(layer: nn.Module) -> bool:
    """Whether this is a quantized layer: what it is part of may be rounded as well."""
    return isinstance(layer, QuantLinear)
