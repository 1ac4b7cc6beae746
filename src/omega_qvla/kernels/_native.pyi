"""The compiled module (csrc/bindings.cpp); absent where it could not be built."""

from typing import Any

def isa_names() -> list[str]: ...
def peak_rate(isa: str = "") -> float: ...

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
