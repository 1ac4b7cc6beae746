"""`quantize_`: somebody else's `nn.Module`, quantized in place.

For a policy object that lives in its own environment (openpi, LeRobot, Isaac-GR00T) and is
not loaded by us. The caller says which layers (regexes) and how to run the module on some
observations (`calibrate`); where the denoising steps are is found by counting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from omega_qvla.calibration.collect import DEFAULT_TOKEN_CAP
from omega_qvla.calibration.observers import InputObserver
from omega_qvla.config import Recipe
from omega_qvla.errors import CalibrationError
from omega_qvla.numerics.layer import QuantizedLayer
from omega_qvla.numerics.quantize_layer import needs_stats, quantize_layer
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.files import check_replaceable
from omega_qvla.pack.foreign import FAMILY, Attached, attach, module_hashes
from omega_qvla.pack.lock import output_lock
from omega_qvla.pack.manifest import Manifest, source_digest
from omega_qvla.pack.partial import PartialBuild
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.writer import FORMAT_NAME, write_pack
from omega_qvla.policies.foreign import StepCounter
from omega_qvla.quantize.origin import software
from omega_qvla.quantize.progress import Progress
from omega_qvla.quantize.survey import (
    Survey,
    Target,
    installed,
    look_over,
    run_once,
    targets_of,
    with_regexes,
)

#: Statistics that `quantize_` holds at once; a module that needs more is run several times.
DEFAULT_MEMORY = 8 << 30


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
    recipe = with_regexes(recipe, backbone, action_head, exclude)
    targets = targets_of(module, recipe)
    survey = look_over(module, calibrate, targets, head, entry)
    manifest = _manifest(module, recipe, survey, head, entry, token_cap, seed)

    def make(todo: Sequence[Target]) -> Iterator[QuantizedLayer]:
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
    survey: Survey,
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
    targets: Sequence[Target],
    survey: Survey,
    make: Callable[[Sequence[Target]], Iterator[QuantizedLayer]],
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


def _collect(
    module: nn.Module,
    calibrate: Callable[[], Any],
    chunk: Sequence[Target],
    survey: Survey,
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
    with installed(counter):
        run_once(calibrate)
    if len(counter.counts) != survey.inferences:
        raise CalibrationError(
            f"calibrate() ran {survey.inferences} inferences first and {len(counter.counts)} when "
            "called again: it has to repeat the same ones"
        )
    return observer.finish()


def _quantize(target: Target, stats: LayerStats | None, survey: Survey) -> QuantizedLayer:
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


def _chunks(targets: Sequence[Target], tokens: int, memory: int) -> Iterator[list[Target]]:
    """Consecutive targets whose statistics together stay under `memory` bytes (one may not)."""
    chunk: list[Target] = []
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
