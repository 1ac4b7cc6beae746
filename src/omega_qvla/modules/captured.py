"""What a part of a network does with inputs of one shape, captured once and repeated.

In a small policy Python takes up to a third of the time to say what to run. The second time that a
function meets inputs of some shapes, its calls of kernels and its operations of torch are
captured, and from then on made again from a list, on the same memory: the same bits, and no
Python between the kernels.

While a function is captured, every operation of torch is looked at. One that reads values into
Python, changes a tensor in place or draws random numbers ends the attempt, and the function runs
by itself from then on. So it does, call by call, whenever somebody watches (a forward hook, a
mode of torch), asks for gradients, or another thread is repeating it at the moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.kernels.rows import compiled
from omega_qvla.modules.capture import LIMIT, Capture, Function, RefusedError, capture

#: Bytes, and shapes of inputs, that are kept for one part; the oldest are given up.
KEPT_BYTES, KEPT_SHAPES = 1 << 26, 64


@dataclass(frozen=True)
class _Known:
    """A captured function, and the hooks of the modules that it would have called."""

    capture: Capture
    hooks: list[Any]


class Captured:
    """The captures of one part of a network. A copy of it begins with none.

    Attributes:
        repeats: how many calls were repeated from a list.
    """

    def __init__(self) -> None:
        self.repeats = 0
        # None: met once. A text: why it cannot be repeated.
        self._known: OrderedDict[Hashable, _Known | str | None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def refused(self) -> list[str]:
        """Why functions that were met twice are not repeated."""
        return [known for known in self._known.values() if isinstance(known, str)]

    def __reduce__(self) -> tuple[type[Captured], tuple[()]]:
        return Captured, ()

    def __call__(
        self, part: nn.Module, function: Function, *inputs: Tensor, key: Hashable = ()
    ) -> Any:
        """function(*inputs), repeated where it can be.

        Args:
            part: holds all modules that the function calls. Its weights do not change any more.
            function: depends on `inputs` and `key` alone, and on what never changes.
            key: all else that decides what it does: the same key, the same calls.
        """
        if not _repeatable(inputs) or not self._lock.acquire(blocking=False):
            return function(*inputs)
        try:
            return self._run(part, function, inputs, key)
        finally:
            self._lock.release()

    def _run(
        self, part: nn.Module, function: Function, inputs: tuple[Tensor, ...], key: Hashable
    ) -> Any:
        place = (key, *((t.shape, t.dtype) for t in inputs), torch.get_num_threads())
        if place not in self._known:
            self._keep(place, None)
            return function(*inputs)
        known = self._known[place]
        if isinstance(known, str):
            return function(*inputs)
        hooks = _hooks(part) if known is None else known.hooks
        if any(hooks):
            return function(*inputs)
        if known is None:
            try:
                known = _Known(capture(function, inputs), hooks)
            except RefusedError as reason:
                self._keep(place, str(reason))
                return function(*inputs)
            self._keep(place, known)
        self._known.move_to_end(place)
        self.repeats += 1
        return known.capture.repeat(inputs)

    def _keep(self, place: Hashable, known: _Known | str | None) -> None:
        self._known.pop(place, None)  # the latest stands last
        self._known[place] = known
        sizes = [k.capture.nbytes if isinstance(k, _Known) else 0 for k in self._known.values()]
        while len(sizes) > KEPT_SHAPES or sum(sizes) > KEPT_BYTES:
            self._known.popitem(last=False)
            del sizes[0]


def _repeatable(inputs: tuple[Tensor, ...]) -> bool:
    """Whether calls with such inputs are captured and repeated, in this state of the program."""
    if compiled() is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all(t.is_cpu for t in inputs) and sum(t.nbytes for t in inputs) <= LIMIT


def _hooks(part: nn.Module) -> list[Any]:
    return [h for m in part.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
