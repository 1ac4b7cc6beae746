"""One run of a function written down: its calls of kernels and its operations of torch, as a list.

Every operation of torch is looked at while the function runs. One that reads values into Python,
changes a tensor in place or draws random numbers ends the attempt: a list could not repeat it.
Operations on what never changes (weights) are not repeated, their results are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from omega_qvla.kernels.rows import compiled, copied

Tensors = Tensor | tuple[Tensor, ...]
Function = Callable[..., Any]  # of tensors, to a tensor or a tuple of them
Calls = list[Callable[[], Any]]

#: Bytes that one capture may make room for. Where more is needed, Python's share is small.
LIMIT = 1 << 24


class RefusedError(Exception):
    """What ran cannot be repeated from a list."""


@dataclass(frozen=True)
class Capture:
    """One function on inputs of one shape.

    calls: without arguments, in order. kept: all whose addresses they know.
    nbytes: of the memory made for it.
    """

    inputs: tuple[Tensor, ...]
    outputs: Tensors
    calls: Calls
    kept: list[Any]
    nbytes: int

    def repeat(self, inputs: tuple[Tensor, ...]) -> Tensors:
        """What the function gives for other inputs of these shapes; not for two callers at once."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            copied(given, into=mine)
        for call in self.calls:
            call()
        if isinstance(self.outputs, Tensor):
            return copied(self.outputs)
        return tuple(copied(t) for t in self.outputs)


def capture(function: Function, inputs: tuple[Tensor, ...]) -> Capture:
    """Run `function` on copies of `inputs`, on the CPU and without gradients.

    Raises:
        RefusedError: it does what a list cannot repeat.
    """
    with torch.inference_mode(False), torch.no_grad():
        mine = tuple(copied(t) for t in inputs)
        watch = _Watch(mine)
        with watch.recording():
            outputs = function(*mine)
    kept = [function, *watch.kept.values()]
    return Capture(mine, outputs, watch.calls(), kept, watch.nbytes)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of torch while a tape records the kernels' calls between them."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        module = compiled()
        assert module is not None  # the caller has looked
        self.kept: dict[int, Tensor] = {id(t): t for t in inputs}
        self._tape = module.Tape()
        self._taken = 0  # calls on the tape that have their place in the list
        self._calls: Calls = []
        self.nbytes = sum(t.nbytes for t in inputs)
        self._varying = {_place(t) for t in inputs}  # memory whose contents differ between calls

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._tape.begin()
        try:
            with _Addresses(self.kept), self:
                yield
        finally:
            self._tape.end()

    def calls(self) -> Calls:
        self._take_kernels()
        return self._calls

    def _take_kernels(self) -> None:
        """One call for those of the kernels since the last one."""
        first, last, tape = self._taken, len(self._tape), self._tape
        if last > first:
            self._calls.append(lambda: tape.run(first, last))
            self._taken = last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [t for value in (*args, *kwargs.values()) for t in _tensors(value) or ()]
        places = {_place(t) for t in read}
        varying = bool(places & self._varying)
        _check(func, varying)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if outputs is None and varying:
            raise RefusedError(f"{func} gives more than tensors")
        if outputs is None:
            return result
        made = [t for t in outputs if _place(t) not in places]  # the others are views
        self._remember(read, made)
        if func.overloadpacket in _ROOM:
            self._varying |= {_place(t) for t in made}
        elif made and varying:
            self._varying |= {_place(t) for t in made}
            self._take_kernels()
            self._calls.append(_again(func, args, kwargs, result))
        return result

    def _remember(self, read: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        self.kept.update({id(t): t for t in (*read, *made)})
        self.nbytes += sum(t.nbytes for t in made)
        if self.nbytes > LIMIT:
            raise RefusedError(f"more than {LIMIT} bytes")


class _Addresses(TorchFunctionMode):
    """Keeps every tensor whose address is asked for: the kernels' calls remember it."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.data_ptr:
            self._kept[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))


#: Operations that make room for what a kernel will write.
_ROOM = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
}
#: Copies, whose own form with `out` copies twice.
_COPIES = {torch.ops.aten.clone, torch.ops.aten._to_copy}
_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _check(func: Any, varying: bool) -> None:
    """Raises RefusedError unless an operation does the same on every call.

    varying: whether what it reads differs between calls.
    """
    tags = set(func.tags)
    if func._schema.is_mutable:
        raise RefusedError(f"{func} changes a tensor in place")
    if torch.Tag.nondeterministic_seeded in tags:
        raise RefusedError(f"{func} draws random numbers")
    if varying and tags & _READS_VALUES:
        raise RefusedError(f"{func} reads values")


def _place(tensor: Tensor) -> int:
    """Where the memory of a tensor and of all its views begins."""
    if tensor.layout is not torch.strided:
        raise RefusedError(f"a tensor of layout {tensor.layout}")
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor] | None:
    """The tensors of a value or of a list of them; None where it is anything else."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value):
        return list(value)
    return None


def _again(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """The same operation once more, into the same memory."""
    if func.overloadpacket in _COPIES:
        return lambda: result.copy_(args[0])
    into = _with_out(func)
    if isinstance(result, Tensor) and into is not None:
        return lambda: into(*args, **kwargs, out=result)

    def copy() -> None:
        again = func(*args, **kwargs)
        for mine, value in zip(_tensors(result) or (), _tensors(again) or (), strict=True):
            mine.copy_(value)

    return copy


def _with_out(func: Any) -> Any | None:
    """The form of an operation that writes into a given tensor; None where there is none."""
    wanted = [argument.name for argument in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        form = getattr(func.overloadpacket, name)
        arguments = form._schema.arguments
        plain = [argument.name for argument in arguments if not argument.is_out]
        types = [str(argument.type) for argument in arguments if not argument.is_out]
        outs = [argument.name for argument in arguments if argument.is_out]
        same = types == [str(argument.type) for argument in func._schema.arguments]
        if outs == ["out"] and plain == wanted and same:
            return form
    return None
