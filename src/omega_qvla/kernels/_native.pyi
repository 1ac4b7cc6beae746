"""The compiled module (csrc/bindings.cpp); absent where it could not be built."""

from typing import Any

def isa_names() -> list[str]: ...
def peak_rate(isa: str = "") -> float: ...
def copy_rows(
    source: int, stride: int, target: int, target_stride: int, rows: int, nbytes: int
) -> None: ...
def copy(source: int, target: int, nbytes: int) -> None: ...

class Tape:
    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self, first: int, last: int) -> None: ...
    def __len__(self) -> int: ...

class Linear:
    def __init__(
        self,
        *,
        qweight: Any,
        inputs: int,
        weight_scale: Any,
        weight_group: int,
        bias: Any | None,
        multiplier: Any | None,
        permutation: Any | None,
        rotation: str,
        block: int,
        matrix: Any | None,
        base: int,
        bits: int,
        clip: float,
        signed_scales: bool,
        act_group: int,
        table: Any | None,
        rank: int,
        lowrank_a: Any | None,
        lowrank_b: Any | None,
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def groups(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def run(self, x: int, rows: int, y: int, step: int, threads: int) -> None: ...
    def quantize(self, x: int, rows: int, step: int, q: int, scale: int) -> None: ...

def norm(
    x: int,
    outer: int,
    stride: int,
    inner: int,
    width: int,
    gain: int,
    shift: int,
    per_gain: int,
    plus: float,
    eps: float,
    center: bool,
    y: int,
    threads: int,
) -> None: ...
def gate(
    gate: int,
    up: int,
    rows: int,
    gate_stride: int,
    up_stride: int,
    width: int,
    kind: int,
    y: int,
    threads: int,
) -> None: ...
def rotate(
    x: int,
    tokens: int,
    stride: int,
    heads: int,
    dim: int,
    cos: int,
    sin: int,
    table: int,
    y: int,
    threads: int,
) -> None: ...
def residual(
    x: int, add: int, gate: int, rows: int, per_gate: int, width: int, y: int, threads: int
) -> None: ...
def attend(
    q: tuple[int, ...],
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    dim: int,
    keys: tuple[int, ...],
    more: tuple[int, ...] | None,
    scale: float,
    causal: bool,
    exact: bool,
    out: int,
    threads: int,
) -> None: ...

class Dense:
    def __init__(self, weight: Any, bias: Any | None) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def run(self, x: int, rows: int, y: int, threads: int) -> None: ...

class Block:
    def __init__(
        self,
        *,
        in_: Linear | Dense,
        out: Linear | Dense,
        up: Linear | Dense,
        down: Linear | Dense,
        query: Linear | Dense | None,
        heads: int,
        kv_heads: int,
        dim: int,
        cross: bool,
        causal: bool,
        center: bool,
        plus: float,
        gated: bool,
        kind: int,
        eps: float,
        scale: float,
        q_gain: Any | None,
        k_gain: Any | None,
    ) -> None: ...
    def run(
        self,
        x: int,
        y: int,
        batch: int,
        rows: int,
        keep: int,
        before: tuple[int, int, int],
        after: tuple[int, int, int],
        modulations: int,
        cos: int,
        sin: int,
        table: int,
        cache: tuple[int, ...] | None,
        step: int,
        threads: int,
    ) -> None: ...
