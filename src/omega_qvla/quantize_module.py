"""`quantize_`: somebody else's `nn.Module`, quantized in place.

For a policy object that lives in its own environment (openpi, LeRobot, Isaac-GR00T) and is
not loaded by us. The caller says which layers (regexes) and how to run the module on some
observations (`calibrate`); where the denoising steps are is found by counting.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omega_qvla.calibration.collect import DEFAULT_TOKEN_CAP
from omega_qvla.calibration.observers import InputObserver
from omega_qvla.config import Recipe, Scheme
from omega_qvla.errors import CalibrationError, RecipeError
from omega_qvla.modules.linear import QuantLinear
from omega_qvla.modules.step_context import current_step
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import needs_stats, quantize_layer
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.files import check_replaceable, tensor_bytes
from omega_qvla.pack.foreign import FAMILY, Attached, attach, module_hashes
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.manifest import Manifest, source_digest
from omega_qvla.pack.partial import PartialBuild
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.writer import FORMAT_NAME, write_pack
from omega_qvla.policies.base import PROTECTED, SIDES
from omega_qvla.policies.foreign import StepCounter, find_linear
from omega_qvla.quantize import DEFAULT_MEMORY, Progress, software


@dataclass(frozen=True)
class _Target:
    """One layer to quantize."""

    name: str
    side: str
    scheme: Scheme
    linear: nn.Linear


@dataclass
class _Survey:
    """What one pass over the calibration inputs tells before anything is measured.

    seen: layer -> the steps it ran in, None for outside them. totals: of the caller's steps.
    inputs: of the first layer of each side, hashed in the order that they came.
    """

    inferences: int = 0
    num_steps: int | None = None
    seen: dict[str, set[int | None]] = field(default_factory=dict)
    totals: set[int] = field(default_factory=set)
    inputs: Any = field(default_factory=hashlib.sha256)


def quantize_(
    module: nn.Module,
    recipe: Recipe,
    calibrate: Callable[[], Any],
    *,
    backbone: str | None = None,
    action_head: str | None = None,
    exclude: str | None = None,
    head: str | None = None,
    entry: str = "forward",
    out: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    token_cap: int = DEFAULT_TOKEN_CAP,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Attached:
    """Quantize linear layers of `module` by `recipe` and replace them in place.

    Nothing is replaced before everything has succeeded. With `out`, finished layers wait in
    `<out>.partial/`, and a build that was cut off goes on there when it is called again. It has
    to be the same build: same weights, recipe, settings, and the same inputs to the first
    layer of each side, which tells a `calibrate` that draws other observations or noise.

    Args:
        module: any module, in eval mode. A layer registered in several places is one layer.
        recipe: its schemes; its regexes where the next three are not given.
        calibrate: runs the module on calibration inputs, one call of `entry` per observation.
            It is called at least twice (steps are counted first; once more for every `memory`
            bytes of statistics) and has to run the same inferences each time.
        backbone, action_head: regexes, searched in the qualified names of `nn.Linear`s. A side
            that neither these nor the recipe name is left alone.
        exclude: regex of names to leave alone, on both sides.
        head: a submodule that is called once per denoising step (see `StepCounter`). None: the
            caller's code says the steps itself, by `denoising_step`, or there are none.
        entry: the method whose call is one inference.
        out: where to save the pack; `attach_pack` puts it into a fresh copy of the module.
        backend, token_cap, seed: as of `apply_pack` and `quantize_policy`.
        resume: False starts anew and discards what an earlier build left at `out`.
        progress: called after each layer.

    Returns:
        The module, its layers, and the counting of steps, which stays installed where static
        scales need it.

    Raises:
        RecipeError: nothing matched, a layer on both sides, a protected or unreplaceable one.
        CalibrationError: no inference was run, the head's calls differ between inferences, a
            layer never ran, missed a step, or ran both inside and outside the steps.
        ConfigError: no such head or entry. PackError: `out` cannot be written, another build is
            writing it, or unfinished work of another build lies there.
    """
    if out is not None:
        check_replaceable(Path(out), FORMAT_NAME)
    recipe = _with_regexes(recipe, backbone, action_head, exclude)
    targets = _targets(module, recipe)
    survey = _survey(module, calibrate, targets, head, entry)
    manifest = _manifest(module, recipe, survey, head, entry, token_cap, seed)

    def make(todo: Sequence[_Target]) -> Iterator[QuantizedLayer]:
        for chunk in _chunks(todo, token_cap * (survey.num_steps or 1), memory):
            stats = _collect(module, calibrate, chunk, survey, head, entry, token_cap, seed)
            for target in chunk:
                yield _quantize(target, stats.get(target.name), survey)
                if progress is not None:
                    done = len(targets) - len(todo) + todo.index(target) + 1
                    progress(Progress("quantizing", done, len(targets), target.name))

    layers: Mapping[str, QuantizedLayer]
    if out is None:
        layers = {layer.name: layer for layer in make(targets)}
    else:
        layers = _kept(Path(out), manifest, targets, survey, make, resume)
    return attach(module, layers, manifest, backend)


def _manifest(
    module: nn.Module,
    recipe: Recipe,
    survey: _Survey,
    head: str | None,
    entry: str,
    token_cap: int,
    seed: int,
) -> Manifest:
    source = module_hashes(module)
    return Manifest(
        family=FAMILY,
        source=source,
        recipe=recipe.to_dict(),
        num_steps=survey.num_steps or 1,
        config={
            "module": f"{type(module).__module__}.{type(module).__qualname__}",
            "head": None if head is None else StepCounter(module, head, entry).head,
            "entry": entry,
        },
        calibration={
            "source": "calibrate()",
            "count": survey.inferences,
            "seed": seed,
            "token_cap": token_cap,
            "num_steps": survey.num_steps,
            "inputs_sha256": survey.inputs.hexdigest(),
            "checkpoint_sha256": source_digest(source),
        },
        software=software(),
    )


def _kept(
    out: Path,
    manifest: Manifest,
    targets: Sequence[_Target],
    survey: _Survey,
    make: Callable[[Sequence[_Target]], Iterator[QuantizedLayer]],
    resume: bool,
) -> Mapping[str, QuantizedLayer]:
    """The layers, each kept as soon as it is made; then the pack `out`, and no more of them."""
    binding = {
        "recipe": dict(manifest.recipe),
        "module": dict(manifest.config),
        "checkpoint": source_digest(manifest.source),
        "calibration": dict(manifest.calibration),
        "layers": {target.name: sorted(map(str, survey.seen[target.name])) for target in targets},
        "software": dict(manifest.software),
    }
    with output_lock(out):
        build = PartialBuild(out, manifest, [target.name for target in targets])
        build.open(binding, resume)
        for layer in make([target for target in targets if not build.finished(target.name)]):
            build.save(layer)
        write_pack(out, manifest, build.layers())
        build.remove()
        return read_pack(out, verify=False).layers


def _with_regexes(
    recipe: Recipe, backbone: str | None, action_head: str | None, exclude: str | None
) -> Recipe:
    """The recipe with the given regexes; sides that nobody names are None."""
    sides: dict[str, Any] = {}
    for side, include in zip(SIDES, (backbone, action_head), strict=True):
        old = recipe.side(side)
        if old is None and include is not None:
            raise RecipeError(f"recipe {recipe.name!r} leaves the {side} as it is")
        include = include if include is not None or old is None else old.include
        if old is not None and include is not None:
            excluded = old.exclude if exclude is None else exclude
            sides[side] = dataclasses.replace(old, include=include, exclude=excluded)
    if not sides:
        raise RecipeError(
            "no layer is named: a foreign module has no default layers, give a regex as "
            "`backbone` or `action_head`, or `include` in the recipe"
        )
    return dataclasses.replace(
        recipe, backbone=sides.get("backbone"), action_head=sides.get("action_head")
    )


def _targets(module: nn.Module, recipe: Recipe) -> list[_Target]:
    if any(isinstance(part, QuantLinear) for part in module.modules()):
        raise RecipeError("the module already has quantized layers; load its checkpoint again")
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    chosen: dict[str, _Target] = {}
    for side in SIDES:
        side_recipe = recipe.side(side)
        if side_recipe is None or side_recipe.include is None:
            continue
        include, exclude = side_recipe.include, side_recipe.exclude
        names = [
            name
            for name in linears
            if re.search(include, name) and not (exclude and re.search(exclude, name))
        ]
        if not names:
            raise RecipeError(
                f"{side}: include {include!r} and exclude {exclude!r} leave none of the "
                f"{len(linears)} linear layers, for instance {', '.join(linears[:3])}"
            )
        for name in names:
            if name in chosen:
                raise RecipeError(f"{name} matches both sides; narrow one of the regexes")
            if re.search(PROTECTED, name) and not recipe.allow_protected:
                raise RecipeError(
                    f"{side}: {name} is a protected layer, which collapses at 4 bits. Narrow "
                    "the regex, or set `allow_protected: true` in the recipe"
                )
            scheme = side_recipe.scheme_for(name)
            if scheme.balance != "none":
                raise RecipeError(
                    f"{name}: `balance` runs one of our policies to measure its attention; a "
                    "module of others cannot have it"
                )
            chosen[name] = _Target(name, side, scheme, find_linear(module, name))
    return list(chosen.values())


def _survey(
    module: nn.Module,
    calibrate: Callable[[], Any],
    targets: Sequence[_Target],
    head: str | None,
    entry: str,
) -> _Survey:
    """Run `calibrate` once; see how many inferences and steps there are and who runs in which."""
    counter = StepCounter(module, head, entry)
    survey = _Survey(seen={target.name: set() for target in targets})
    first: dict[str, str] = {}  # side -> the layer that ran first

    def look(target: _Target) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            survey.seen[target.name].add(counter.index())
            step = current_step()
            survey.totals |= set() if step is None else {step.total}
            if first.setdefault(target.side, target.name) == target.name:
                x = args[0] if args else kwargs["input"]
                survey.inputs.update(f"{target.name} {list(x.shape)}".encode())
                survey.inputs.update(tensor_bytes(x))

        return hook

    with _installed(counter), ExitStack() as hooks:
        for target in targets:
            handle = target.linear.register_forward_pre_hook(look(target), with_kwargs=True)
            hooks.callback(handle.remove)
        _run(calibrate)
    survey.inferences = len(counter.counts)
    if survey.inferences == 0:
        raise CalibrationError(
            f"calibrate() ran no inference: it has to call the module's {entry!r} (another "
            "method: name it as `entry`)"
        )
    survey.num_steps = _steps(counter, survey)
    _check_layers(survey)
    return survey


def _steps(counter: StepCounter, survey: _Survey) -> int | None:
    """Denoising steps per inference, by the head's calls or by what the caller said."""
    if counter.head is None:
        if len(survey.totals) > 1:
            raise CalibrationError(
                f"trajectories of {sorted(survey.totals)} denoising steps: calibrate for one number"
            )
        return next(iter(survey.totals), None)
    first = counter.counts[0]
    for i, calls in enumerate(counter.counts):
        if calls != first:
            raise CalibrationError(
                f"{counter.head} was called {first} times in inference 0 and {calls} times in "
                f"inference {i}: the number of denoising steps has to be the same in all"
            )
    if first == 0:
        raise CalibrationError(
            f"{counter.head} was never called in {len(counter.counts)} inference(s); a hook does "
            "not see `module.forward(...)`: name a submodule that is called once per step, for "
            "instance the projection of the noisy actions"
        )
    return first


def _check_layers(survey: _Survey) -> None:
    for name, seen in survey.seen.items():
        steps = {step for step in seen if step is not None}
        if not seen:
            raise CalibrationError(f"layer {name} never ran during calibration; exclude it")
        if steps and None in seen:
            raise CalibrationError(
                f"layer {name} runs both inside and outside the denoising steps; it cannot have "
                "one table of scales. Exclude it"
            )
        missing = sorted(set(range(survey.num_steps or 0)) - steps)
        if steps and missing:
            raise CalibrationError(
                f"layer {name} misses denoising step(s) {', '.join(map(str, missing))} of "
                f"{survey.num_steps}: they would never be calibrated. Exclude it"
            )


def _collect(
    module: nn.Module,
    calibrate: Callable[[], Any],
    chunk: Sequence[_Target],
    survey: _Survey,
    head: str | None,
    entry: str,
    token_cap: int,
    seed: int,
) -> Mapping[str, LayerStats]:
    """Statistics of the chunk's layers that need any, by one more run of `calibrate`."""
    watched = {target.name: target.linear for target in chunk if needs_stats(target.scheme)}
    if not watched:
        return {}
    observer = InputObserver(
        watched,
        num_steps=survey.num_steps or 1,
        token_cap=token_cap,
        observations=survey.inferences,
        seed=seed,
        share=False,
    )
    counter = StepCounter(module, head, entry, survey.num_steps)
    counter.around = observer.watching
    with _installed(counter):
        _run(calibrate)
    if len(counter.counts) != survey.inferences:
        raise CalibrationError(
            f"calibrate() ran {survey.inferences} inferences first and {len(counter.counts)} when "
            "called again: it has to repeat the same ones"
        )
    return observer.finish()


def _quantize(target: _Target, stats: LayerStats | None, survey: _Survey) -> QuantizedLayer:
    linear = target.linear
    inside = survey.seen[target.name] != {None}
    layer = quantize_layer(
        target.name,
        target.side,
        linear.weight.detach(),
        None if linear.bias is None else linear.bias.detach(),
        target.scheme,
        stats,
        survey.num_steps if inside else None,
    )
    return layer.to("cpu")


def _chunks(targets: Sequence[_Target], tokens: int, memory: int) -> Iterator[list[_Target]]:
    """Consecutive targets whose statistics together stay under `memory` bytes (one may not)."""
    chunk: list[_Target] = []
    used = 0
    for target in targets:
        width = target.linear.in_features
        cost = 4 * width * (width + tokens) if needs_stats(target.scheme) else 0
        if chunk and used + cost > memory:
            yield chunk
            chunk, used = [], 0
        chunk.append(target)
        used += cost
    if chunk:
        yield chunk


def _run(calibrate: Callable[[], Any]) -> None:
    with torch.no_grad():
        calibrate()


@contextmanager
def _installed(counter: StepCounter) -> Iterator[None]:
    counter.install()
    try:
        yield
    finally:
        counter.remove()
