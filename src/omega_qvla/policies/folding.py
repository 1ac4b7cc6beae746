"""Exact rescaling of a site's input channels, paid for by the weights around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.errors import NumericsError
from omega_qvla.numerics import smoothing
from omega_qvla.policies.base import Producer, Site


def site_width(module: nn.Module, site: Site) -> int:
    """How many channels of the site can be scaled freely: the producer's outputs.

    Fewer than the consumers' inputs where several query heads share a value head.

    Raises:
        NumericsError: the site has no producer.
    """
    producer = _producer(site)
    if producer.kind == "adaptive":
        return _weight(module, site.consumers[0]).shape[1]
    return _weight(module, producer.name).shape[0]


def producer_gain(module: nn.Module, site: Site) -> Tensor:
    """How strongly the producer's weights alone drive each free channel, float64 [width]."""
    producer, width = _producer(site), site_width(module, site)
    weight = _weight(module, producer.name).double()
    if producer.kind == "adaptive":
        bias = _bias(module, producer.name)
        scale = torch.zeros(width) if bias is None else bias[:width]
        return (1 + scale.double()).abs()
    if producer.kind == "rows":
        return weight.square().sum(dim=1).sqrt()
    return (weight + 1 if producer.kind == "norm1" else weight).abs()


@torch.no_grad()
def divide_site(module: nn.Module, site: Site, divisor: Tensor) -> None:
    """Divide the site's input by `divisor`, in place, leaving the function as it is.

    The producer's channels are divided and the consumers' columns multiplied. Exact up to
    rounding of the weights; a power of two rounds nothing except in `1 + weight` forms, which
    therefore must be kept in 32 bits.

    Args:
        module: the network; producer and consumers are plain layers.
        site: where.
        divisor: positive [site_width].

    Raises:
        NumericsError: the site has no producer, a divisor is not positive and finite, or the
            producer's weights are too narrow to be rescaled exactly.
    """
    producer = _producer(site)
    divisor = divisor.to(_weight(module, producer.name).device)
    spread = _spread(divisor, producer) if producer.kind == "rows" else divisor
    writes: list[tuple[Tensor, Tensor]] = []
    for name in (producer.name, *producer.also):
        weight, bias = _weight(module, name), _bias(module, name)
        new_weight, new_bias = _divided(producer, name, weight, bias, divisor)
        writes.append((weight, new_weight))
        if bias is not None and new_bias is not None:
            writes.append((bias, new_bias))
    for name in (*site.consumers, *site.coupled):
        weight = _weight(module, name)
        writes.append((weight, smoothing.fold_into_columns(weight, spread)))
    # Everything is computed before anything is written: an error leaves the policy whole.
    for target, value in writes:
        target.copy_(value)


def _divided(
    producer: Producer, name: str, weight: Tensor, bias: Tensor | None, divisor: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the producing layer `name` with its channels divided."""
    if producer.kind in ("norm1", "adaptive") and weight.dtype.itemsize < 4:
        raise NumericsError(
            f"{name} is kept in {weight.dtype}, where 1 + weight cannot be rescaled exactly: "
            "load the policy with dtype=torch.float32"
        )
    if producer.kind == "rows":
        return smoothing.fold_into_rows(weight, divisor, bias)
    if producer.kind == "adaptive":
        return smoothing.fold_into_modulation(weight, bias, divisor, scale_chunk=0, shift_chunk=1)
    if producer.kind == "norm1":
        return smoothing.fold_into_norm(weight, divisor, bias, "one_plus")
    return smoothing.fold_into_norm(weight, divisor, bias, "plain")


def _spread(divisor: Tensor, producer: Producer) -> Tensor:
    """A divisor of the value rows as the consumers of the attention see it."""
    heads = producer.heads
    if heads is None:
        return divisor
    per_head = divisor.reshape(heads.num_kv_heads, heads.head_dim)
    group = heads.num_heads // heads.num_kv_heads
    return per_head.repeat_interleave(group, dim=0).reshape(-1)


def _producer(site: Site) -> Producer:
    if site.producer is None:
        raise NumericsError(
            f"the input of {site.consumers[0]} has no producer that a channel scale folds into"
        )
    return site.producer


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module.get_submodule(name), "weight", None)
    if not isinstance(weight, Tensor):
        raise NumericsError(f"{name} has no weight: the policy is already quantized")
    return weight.detach()


def _bias(module: nn.Module, name: str) -> Tensor | None:
    bias = getattr(module.get_submodule(name), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
