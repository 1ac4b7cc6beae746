"""From the arguments of `omega-qvla compare --recipes` to what is compared."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.comparison.verb import EPISODES, HELD_OUT
from omega_qvla.cli.episode import EXECUTE
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.calibration.samples import ObservationSet
    from omega_qvla.cli.comparison.plan import Comparison


def plan_from_arguments(
    args: argparse.Namespace,
) -> tuple[Comparison, dict[str, ObservationSet]]:
    """The comparison of a command line, and the recordings that it is to use, if any.

    Raises:
        ConfigError: options missing or excluding each other.
        RecipeError, CheckpointError, CalibrationError: whatever does not exist.
    """
    from omega_qvla.cli.comparison.arms import parse_arms
    from omega_qvla.cli.comparison.plan import OUTLIERS, PLAIN, Comparison

    if args.out is None or not args.checkpoint:
        raise ConfigError("--recipes takes --checkpoint DIR (perhaps several) and --out DIR")
    if args.results or args.pack:
        raise ConfigError("--recipes makes its own arms: leave out results files and --pack")
    _refuse_others(args)
    arms = parse_arms(args.recipes)
    checkpoints = name_checkpoints(args.checkpoint)
    recordings = bool(args.observations or args.dataset)
    episodes = args.episodes
    if episodes is None:
        episodes = 0 if recordings else EPISODES
    labels = [arm.name for arm in arms]
    fields: dict[str, Any] = {
        "variants": (PLAIN, OUTLIERS) if args.outliers else (PLAIN,),
        "work": args.work or args.out / "work",
        "episodes": episodes,
        "workers": args.workers,
        "record": args.record if episodes else 0,
        "collect_episodes": args.expert_episodes,
        "num_samples": args.calibration_samples,
        "held_out": args.num_samples or HELD_OUT,
        "draws": args.draws,
        "layer_samples": args.layer_samples,
        "shown": "omega" if "omega" in labels else labels[-1],
        "ratio": args.ratio,
        "backend": args.backend,
        "device": args.device,
        "command": f"omega-qvla {shlex.join(sys.argv[1:])}",
    }
    recorded = _recordings(args, checkpoints, fields, [a.samples or 0 for a in arms])
    if not recordings or episodes:
        fields["env_options"] = {"size": _image_size(checkpoints)}
    tasks = _tasks(args) if not recordings or episodes else ()
    return Comparison(args.out, checkpoints, arms, tasks, **fields), recorded


#: Options of `compare` that a comparison of recipes has no use for, and what they are unless given.
_OTHERS: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("reference", "arms", "markdown", "videos", "episode", "episode_task")),
        **dict.fromkeys(("action_key", "act_bits", "settings", "tokenizer", "revision")),
        "offline": False,
        "missing": "fallback",
        "variant": "plain",
        "execute": EXECUTE,
    }
)


def _refuse_others(args: argparse.Namespace) -> None:
    """Raise ConfigError for an option that would change nothing."""
    given = [name for name, default in _OTHERS.items() if getattr(args, name) != default]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: of no use with --recipes, which builds its arms by recipe from checkpoints "
            "that are whole and compares them with full precision; leave it out"
        )


def name_checkpoints(paths: list[Path]) -> dict[str, Path]:
    """Name -> path: the family where it tells them apart, else the directory's name.

    Raises:
        ConfigError: two directories of one name and family.
        CheckpointError: no checkpoint.
    """
    from omega_qvla.cli.checkpoints import family_of

    families = [family_of(path) for path in paths]
    names = [
        family if families.count(family) == 1 else path.resolve().name
        for family, path in zip(families, paths, strict=True)
    ]
    if len(set(names)) != len(names):
        raise ConfigError(f"checkpoints of one name: {', '.join(names)}; rename a directory")
    return dict(zip(names, paths, strict=True))


def _image_size(checkpoints: dict[str, Path]) -> int:
    from omega_qvla.cli.checkpoints import open_checkpoint

    sizes = {name: open_checkpoint(path).image_size for name, path in checkpoints.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"the checkpoints see images of different sizes: {sizes}")
    return next(iter(sizes.values()))


def _tasks(args: argparse.Namespace) -> tuple[str, ...]:
    from omega_qvla.cli.sources import check_tasks
    from omega_qvla.envs.metaworld import TASKS

    return tuple(check_tasks(args.tasks or list(TASKS)))


def _recordings(
    args: argparse.Namespace,
    checkpoints: dict[str, Path],
    fields: dict[str, Any],
    samples: list[int],
) -> dict[str, ObservationSet]:
    """Calibration and held-out observations of --observations or --dataset; sets `collector`."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.cli.recordings import draw_checked, held_out_of, open_recordings

    outlines = [open_checkpoint(path).policy for path in checkpoints.values()]
    source = open_recordings(args, outlines[0])
    if source is None:
        return {}
    if not held_out_of(args):
        raise ConfigError(
            "a comparison calibrates on some episodes and measures on others: --held-out must "
            "be a fraction between 0 and 1"
        )
    most = max([fields["num_samples"], *samples])
    recorded = {
        "calibration": draw_checked(args, source, "calibration", most, outlines[0]),
        "held-out": draw_checked(args, source, "held-out", fields["held_out"], outlines[0]),
    }
    for policy in outlines[1:]:
        policy.prepare(recorded["held-out"].observations[:1])
    fields["collector"] = f"{source.source}; {recorded['calibration'].digest()[:16]}"
    return recorded
