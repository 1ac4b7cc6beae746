"""Quantized layers inside somebody else's `nn.Module`, in place.

Such a module keeps its own forward, dtypes and autocast. Two things are needed around it: a
layer that passes for the `nn.Linear` it replaces, and the number of the running denoising
step, which foreign code does not tell. It is counted: each call of one module of the action
head (the *head*) opens the next step, which lasts until the following call or until the
inference (one call of the *entry* method) ends.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.errors import ConfigError, PackError, RecipeError, StepError
from omega_qvla.kernels.registry import Backend, resolve_backend
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.step_context import current_step, denoising_step
from omega_qvla.numerics.layer import QuantizedLayer


@dataclass
class _Inference:
    """One running inference: how often its head was called, and the step that is open."""

    counter: StepCounter
    calls: int = 0
    step: ExitStack = field(default_factory=ExitStack)


# Of this context (thread, task): inferences that run side by side count apart.
_RUNNING: ContextVar[_Inference | None] = ContextVar("omega_qvla_inference", default=None)


class StepCounter:
    """Finds the denoising steps of a module by counting the calls of its head.

    Args:
        module: the whole policy.
        head: qualified name, or a regex found in exactly one, of a submodule that is called
            once per denoising step; hooks see `head(...)`, not `head.forward(...)`.
        entry: the method of `module` whose call is one inference.
        num_steps: steps per inference; None: only count, open no step.

    Attributes:
        head: the qualified name.
        counts: while calibrating, calls of the head in each inference that ended.
        around: called with the inference's number, gives a context to run it in.

    Raises:
        ConfigError: no or several heads, no such entry, or one that `torch.compile` made.
    """

    def __init__(
        self,
        module: nn.Module,
        head: str | None,
        entry: str = "forward",
        num_steps: int | None = None,
    ) -> None:
        self.module, self.entry, self.num_steps = module, entry, num_steps
        self.head = None if head is None else find_head(module, head)
        self.counts: list[int] = []
        self.around: Callable[[int], AbstractContextManager[None]] | None = None
        self._undo = ExitStack()
        _check_entry(module, entry)

    def install(self) -> None:
        """Watch head and entry until `remove()`."""
        if self.head is not None:
            hook = self.module.get_submodule(self.head).register_forward_pre_hook(self._next)
            self._undo.callback(hook.remove)
        original, own = getattr(self.module, self.entry), vars(self.module).get(self.entry)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.inference():
                return original(*args, **kwargs)

        object.__setattr__(self.module, self.entry, counted)
        self._undo.callback(self._restore, own)

    def _restore(self, own: Any) -> None:
        if own is None:
            object.__delattr__(self.module, self.entry)
        else:
            object.__setattr__(self.module, self.entry, own)

    def remove(self) -> None:
        """Leave head and entry as they were found."""
        self._undo.close()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """One inference, for callers who do not go through the entry; inner ones join it.

        Raises:
            StepError: the head was called more or less often than there are steps.
        """
        running = _RUNNING.get()
        if running is not None and running.counter is self:
            yield
            return
        one = _Inference(self)
        token = _RUNNING.set(one)
        try:
            with ExitStack() as stack:
                if self.around is not None:
                    stack.enter_context(self.around(len(self.counts)))
                stack.enter_context(one.step)
                yield
        finally:
            _RUNNING.reset(token)
        if self.num_steps is None or self.around is not None:
            self.counts.append(one.calls)
        if None not in (self.num_steps, self.head) and one.calls != self.num_steps:
            raise StepError(
                f"{self.head} was called {one.calls} times in one inference; its layers are "
                f"calibrated for {self.num_steps} denoising steps. Run that many, or calibrate "
                "again"
            )

    def index(self) -> int | None:
        """Number of the step that the running inference is in; None before the head's call.

        Without a head: what the caller says by `denoising_step`.
        """
        if self.head is None:
            step = current_step()
            return None if step is None else step.index
        one = _RUNNING.get()
        return None if one is None or one.calls == 0 else one.calls - 1

    def _next(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        one = _RUNNING.get()
        if one is None or one.counter is not self:
            raise StepError(
                f"{self.head} was called outside an inference; call the policy by its "
                f"{self.entry!r}, or wrap the call in `inference()`"
            )
        one.step.close()
        if current_step() is not None:
            raise StepError(
                f"the caller gives the denoising step, and so does {self.head}: leave out `head`"
            )
        index, one.calls = one.calls, one.calls + 1
        if self.num_steps is None:
            return
        if index >= self.num_steps:
            raise StepError(
                f"{self.head} was called a {index + 1}th time in one inference; its layers are "
                f"calibrated for {self.num_steps} denoising steps"
            )
        one.step.enter_context(denoising_step(index, self.num_steps))


def find_head(module: nn.Module, head: str) -> str:
    """The qualified name of the one submodule called, or matched by, `head`. ConfigError."""
    names: list[str] = [name for name, _ in module.named_modules() if name]
    if head in names:
        return head
    try:
        matches = [name for name in names if re.search(head, name)]
    except re.error as error:
        raise ConfigError(f"head {head!r} is no regular expression: {error}") from error
    if len(matches) != 1:
        some = ", ".join(matches[:5]) or f"none of {', '.join(names[:5])}, ..."
        raise ConfigError(f"head {head!r} must match one module, not {len(matches)}: {some}")
    return matches[0]


def _check_entry(module: nn.Module, entry: str) -> None:
    method = getattr(module, entry, None)
    if not callable(method):
        raise ConfigError(f"{type(module).__name__} has no method {entry!r} to be the entry")
    if hasattr(method, "_torchdynamo_orig_callable"):
        raise ConfigError(
            f"{entry!r} is compiled: steps cannot be counted in it; put the method that "
            "torch.compile was given back first"
        )


class ForeignLinear(QuantLinear):
    """A `QuantLinear` that foreign code can take for the `nn.Linear` it replaces.

    `weight` and `bias` have the old shape, dtype and device, since policies ask for those of a
    projection, but hold NaN and no memory: whoever computes with them does not go unnoticed.
    Under autocast the kernel runs outside of it and the result has the dtype it would have.
    """

    _nan: Tensor

    def __init__(self, layer: QuantizedLayer, backend: Backend, old: nn.Linear) -> None:
        super().__init__(layer, backend, old.weight.device)
        nan = torch.full((), float("nan"), dtype=old.weight.dtype, device=old.weight.device)
        self.register_buffer("_nan", nan, persistent=False)
        self._biased = old.bias is not None
        self.training = old.training

    @property
    def weight(self) -> Tensor:
        """NaN [out, in]."""
        return self._nan.expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        """NaN [out], or None."""
        return self._nan.expand(self.out_features) if self._biased else None

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out], in its dtype or that of the running autocast."""
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return super().forward(input)
        with torch.autocast(kind, enabled=False):
            return super().forward(input).to(torch.get_autocast_dtype(kind))


def find_linear(module: nn.Module, name: str) -> nn.Linear:
    """The plain `nn.Linear` called `name`, which may be replaced without losing anything.

    Raises:
        RecipeError: it is none, or it carries what a replacement would drop (named).
    """
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise RecipeError(f"{name} is a {type(linear).__name__}, not a plain nn.Linear")
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)
    if any(hooks) or "forward" in vars(linear) or hasattr(linear, "parametrizations"):
        raise RecipeError(
            f"{name} has hooks, a parametrization or a forward of its own, which replacing it "
            "would lose; remove them or exclude it"
        )
    return linear


def install_layers(
    module: nn.Module, layers: Mapping[str, QuantizedLayer], backend: str = "auto"
) -> Backend:
    """Replace the linears named in `layers`, wherever in `module` each is registered.

    Everything is checked and prepared before anything is replaced.

    Raises:
        PackError: a name is missing, no plain nn.Linear, or of another shape.
        BackendError: the backend cannot run a layer.
    """
    found = {}
    for name, layer in layers.items():
        try:
            linear = find_linear(module, name)
        except (AttributeError, RecipeError) as error:
            raise PackError(f"layer {name} cannot be put in place: {error}") from error
        shape = (layer.out_features, layer.in_features)
        if (linear.out_features, linear.in_features) != shape:
            raise PackError(f"layer {name} is {tuple(linear.weight.shape)}, the pack's {shape}")
        found[name] = linear
    device = next((linear.weight.device for linear in found.values()), torch.device("cpu"))
    used = resolve_backend(backend, layers.values(), device)
    ready = {id(old): ForeignLinear(layers[name], used, old) for name, old in found.items()}
    for parent in list(module.modules()):
        for child, current in list(parent._modules.items()):
            if id(current) in ready:
                parent._modules[child] = ready[id(current)]
    return used
