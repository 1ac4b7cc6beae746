"""Long module names in few words."""

from __future__ import annotations

import re
from typing import NamedTuple

_BLOCK = re.compile(r"^(?P<stack>.*?)\.?(?P<index>\d+)\.(?P<kind>.+)$")
#: Says nothing about where a layer is.
_FILLER = {"model", "layers", "transformer_blocks", "transformer", "module", "blocks"}


class LayerName(NamedTuple):
    """stack: which tower ("gemma_expert"); block: its number; kind: the layer in the block."""

    stack: str
    block: int
    kind: str


def split_name(name: str) -> LayerName:
    """Take `tower.layers.3.mlp.up_proj` apart; a name without a block has index -1."""
    match = _BLOCK.match(name)
    if match is None:
        return LayerName("", -1, name)
    words = [word for word in match["stack"].split(".") if word not in _FILLER]
    return LayerName(words[-1] if words else "", int(match["index"]), match["kind"])


def short_name(name: str) -> str:
    """`block 3 mlp.up_proj`, with the tower before it where there is one."""
    stack, index, kind = split_name(name)
    if index < 0:
        return name
    return f"{stack} block {index} {kind}".strip()
