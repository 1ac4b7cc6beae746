"""From the arguments of `omega-qvla eval` to what is played, and where."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omega_qvla.cli.loading import loading, pack_options
from omega_qvla.cli.parsing import at_least, unique
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.cli.checkpoints import Checkpoint
    from omega_qvla.envs.libero_protocol import LiberoProtocol
    from omega_qvla.evaluation.executor import Executor
    from omega_qvla.evaluation.plan import Plan
    from omega_qvla.evaluation.records import Arm, Episode, Protocol
    from omega_qvla.policies.base import Policy

#: Name of the arm that a bundle is, where it stands in the checkpoint's place.
BUNDLE = "bundle"
#: Family, in the records, of arms that belong to no checkpoint.
SCRIPTED = "scripted"
EXECUTORS = ("process", "pool", "ray")
_EPISODES, _EXECUTE, _MAX_STEPS = 20, 5, 200


class _World(NamedTuple):
    """The simulator's part of a plan."""

    env: str
    options: dict[str, Any]
    tasks: Sequence[str]
    seeds: range
    protocol: Protocol


def configure_world(parser: argparse.ArgumentParser) -> None:
    """What is played: simulator, tasks, initial states, protocol."""
    group = parser.add_argument_group("what is played")
    group.add_argument(
        "--env",
        default="metaworld",
        metavar="NAME",
        help="metaworld, or module:function that makes an environment for a task "
        "(then name --tasks)",
    )
    group.add_argument(
        "--suite", nargs="+", metavar="SUITE", help="LIBERO: libero_object, libero_10, ..."
    )
    group.add_argument(
        "--tasks", "--task", nargs="+", metavar="TASK",
        help="names, or numbers within the suite (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--episodes", "--trials", type=at_least(1), metavar="N",
        help=f"per task (default: {_EPISODES}; LIBERO: the protocol's trials)",
    )  # fmt: skip
    group.add_argument(
        "--first-seed", type=at_least(0), default=0, metavar="N",
        help="skip this many seeds, or initial states",
    )  # fmt: skip
    group.add_argument(
        "--protocol", metavar="NAME",
        help="LIBERO: openpi (default), gr00t-n1.5, omega-paper, or a YAML file of your own",
    )  # fmt: skip
    group.add_argument("--assets", type=Path, metavar="DIR", help="LIBERO: where its assets are")
    group.add_argument(
        "--substitutes", action="store_true",
        help="LIBERO: accept assets that are not all its own; results say so",
    )  # fmt: skip
    group.add_argument(
        "--execute", type=at_least(1), metavar="N",
        help=f"actions used of each chunk (default: {_EXECUTE}; LIBERO: the protocol's)",
    )  # fmt: skip
    group.add_argument(
        "--max-steps", type=at_least(1), metavar="N",
        help=f"then it has failed (default: {_MAX_STEPS}; LIBERO: the protocol's)",
    )  # fmt: skip


def configure_executor(parser: argparse.ArgumentParser) -> None:
    """Where it is played."""
    group = parser.add_argument_group("where it is played")
    group.add_argument(
        "--executor", choices=EXECUTORS,
        help="this process, a pool of processes on this machine (default), or a Ray cluster",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=at_least(0), default=2, metavar="N",
        help="processes with simulators (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--devices", nargs="+", default=(), metavar="DEVICE",
        help="pool: devices of the workers in turn, e.g. cuda:0 cuda:1 (with --device cuda)",
    )  # fmt: skip
    group.add_argument(
        "--address", metavar="HOST:PORT",
        help="ray: of the cluster's head, or auto (default: start Ray on this machine)",
    )  # fmt: skip
    group.add_argument(
        "--policies", type=at_least(1), default=1, metavar="N",
        help="ray: copies of the policy (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--gpus", type=float, default=0.0, metavar="N",
        help="ray: GPUs of each copy of the policy, may be a fraction (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--timeout", type=float, default=900.0, metavar="S",
        help="an episode that takes longer counts as a dead worker (default: 900 s)",
    )  # fmt: skip
    group.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N",
        help="play every N-th episode from the I-th on, I from 0; join with --merge",
    )  # fmt: skip


def shard(text: str) -> tuple[int, int]:
    """An argument type: I/N with 0 <= I < N."""
    left, _, right = text.partition("/")
    if not (left.isdecimal() and right.isdecimal() and int(left) < int(right)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, got {text!r}")
    return int(left), int(right)


def make_executor(args: argparse.Namespace) -> Executor:
    """Where the arguments say. Raises ConfigError for options of another executor."""
    from omega_qvla.evaluation.cluster import RayCluster
    from omega_qvla.evaluation.executor import InProcess
    from omega_qvla.evaluation.pool import ProcessPool

    kind = args.executor or ("pool" if args.workers else "process")
    if args.devices and kind != "pool":
        raise ConfigError(f"--devices is for --executor pool, not {kind}")
    if (args.address or args.policies != 1 or args.gpus) and kind != "ray":
        raise ConfigError(f"--address, --policies and --gpus are for --executor ray, not {kind}")
    if kind == "process":
        return InProcess()
    workers = max(1, args.workers)
    if kind == "pool":
        return ProcessPool(workers, tuple(args.devices), args.timeout)
    return RayCluster(args.address, workers, args.policies, args.gpus, args.timeout)


def make_plan(args: argparse.Namespace) -> Plan:
    """The evaluation that the arguments describe. Raises ConfigError, CheckpointError."""
    from omega_qvla.cli.checkpoints import open_checkpoint
    from omega_qvla.evaluation.plan import Plan, episodes

    options = loading(args)
    outline = None if args.checkpoint is None else open_checkpoint(args.checkpoint, **options)
    size = None if outline is None else outline.image_size
    world = _libero(args) if args.suite else _other(args, size)
    if outline is not None:
        _check_fits(world, outline.policy)
    index, count = args.shard
    chosen: tuple[Episode, ...] = episodes(list(world.tasks), world.seeds)[index::count]
    return Plan(
        arms=_arms(args, outline, options),
        episodes=chosen,
        protocol=world.protocol,
        env=world.env,
        env_options=world.options,
    )


def _other(args: argparse.Namespace, image_size: int | None) -> _World:
    from omega_qvla.envs.metaworld import TASKS, eval_seeds
    from omega_qvla.evaluation.records import Protocol

    if args.protocol or args.assets or args.substitutes:
        raise ConfigError("--protocol, --assets and --substitutes are LIBERO's: give --suite too")
    options: dict[str, Any] = {}
    tasks: Sequence[str] = args.tasks or ()
    if args.env == "metaworld":
        from omega_qvla.cli.sources import check_tasks

        tasks = check_tasks(tasks or list(TASKS))
        options = {} if image_size is None else {"size": image_size}
    if not tasks:
        raise ConfigError(f"--tasks is needed for the environment {args.env}")
    protocol = Protocol(args.execute or _EXECUTE, args.max_steps or _MAX_STEPS)
    seeds = eval_seeds(args.episodes or _EPISODES, args.first_seed)
    return _World(args.env, options, tasks, seeds, protocol)


def _libero(args: argparse.Namespace) -> _World:
    from omega_qvla.envs.libero_files import split_task, suite_tasks
    from omega_qvla.envs.libero_protocol import libero_protocol
    from omega_qvla.evaluation.records import Protocol

    if args.env not in ("metaworld", "libero"):
        raise ConfigError(f"--suite is LIBERO's, and --env {args.env} is not: give one of them")
    if args.execute or args.max_steps:
        raise ConfigError(
            "LIBERO's protocol says how many actions are executed and when an episode has failed: "
            "write one of your own in a YAML file and give it as --protocol"
        )
    protocol: LiberoProtocol = libero_protocol(args.protocol or "openpi")
    tasks = [task for suite in args.suite for task in suite_tasks(suite)]
    if args.tasks:
        asked = [t if "/" in t else f"{s}/{t}" for s in args.suite for t in args.tasks]
        tasks = list(dict.fromkeys("/".join(split_task(task)) for task in asked))
    options: dict[str, Any] = {"protocol": protocol.to_dict()}
    if args.assets is not None:
        options["assets"] = str(args.assets)
    if args.substitutes:
        options["substitutes"] = True
    seeds = range(args.first_seed, args.first_seed + (args.episodes or protocol.trials))
    rollout = Protocol(protocol.execute, None, protocol.denoising_steps)
    return _World("libero", options, tasks, seeds, rollout)


def _check_fits(world: _World, policy: Policy) -> None:
    """Cameras and actions, before anything is loaded. Raises ConfigError."""
    from omega_qvla.evaluation.plan import resolve

    made = resolve(world.env)
    # What only an instance knows (a property) is found out at its first episode.
    cameras, width = getattr(made, "cameras", None), getattr(made, "action_dim", None)
    if isinstance(cameras, tuple) and not set(policy.cameras) <= set(cameras):
        missing = [camera for camera in policy.cameras if camera not in cameras]
        raise ConfigError(
            f"the policy looks through the cameras {', '.join(policy.cameras)}; {world.env} has "
            f"{', '.join(cameras)}, and lacks {', '.join(missing)}"
        )
    if isinstance(width, int) and policy.action_dim != width:
        raise ConfigError(
            f"the policy's actions have {policy.action_dim} entries, those of {world.env} {width}: "
            "this checkpoint was trained for another robot"
        )
    if policy.action_horizon < world.protocol.execute:
        raise ConfigError(
            f"the policy predicts {policy.action_horizon} actions, the protocol executes "
            f"{world.protocol.execute} of each chunk"
        )


def _arms(
    args: argparse.Namespace, outline: Checkpoint | None, options: Mapping[str, Any]
) -> tuple[Arm, ...]:
    from omega_qvla.evaluation.records import REFERENCE

    if outline is None and args.arm:
        raise ConfigError("--arm is a pack of a checkpoint: give the checkpoint as well")
    arms = [] if outline is None else _checkpoint_arms(args, outline, options)
    family = SCRIPTED if outline is None else outline.family
    arms += [_policy_arm(text, args, family) for text in args.policy or ()]
    if not arms:
        raise ConfigError(
            "nothing to evaluate: give a checkpoint, --arm LABEL=PACK, or --policy NAME"
        )
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            what = "the checkpoint itself" if label in (REFERENCE, BUNDLE) else "given twice"
            raise ConfigError(f"the arm {label!r} is {what}; every arm a name of its own")
    return tuple(arms)


def _checkpoint_arms(
    args: argparse.Namespace, outline: Checkpoint, options: Mapping[str, Any]
) -> list[Arm]:
    """The checkpoint (or the bundle in its place), and its packs."""
    from omega_qvla.bundle.manifest import is_bundle
    from omega_qvla.evaluation.records import REFERENCE

    bundled = is_bundle(outline.path)
    packs: dict[str, str | None] = {}
    if not args.no_reference:
        packs[BUNDLE if bundled else REFERENCE] = None
    for label, pack in unique(args.arm, "arm").items():
        if label == REFERENCE:
            raise ConfigError(f"the arm {REFERENCE!r} is the checkpoint itself; rename the pack's")
        if bundled:
            raise ConfigError(f"{args.checkpoint} is a bundle: it takes no pack, leave {label} out")
        packs[label] = pack
    if args.act_bits is not None and not any(packs.values()) and not bundled:
        raise ConfigError("--act-bits are of a pack's activations: give --arm LABEL=PACK")
    return [_checkpoint_arm(args, label, pack, outline, options) for label, pack in packs.items()]


def _checkpoint_arm(
    args: argparse.Namespace,
    label: str,
    pack: str | None,
    outline: Checkpoint,
    options: Mapping[str, Any],
) -> Arm:
    """The checkpoint (or the bundle in its place), the checkpoint with a pack, or a bundle."""
    from omega_qvla.bundle.manifest import is_bundle
    from omega_qvla.evaluation.records import Arm

    subject = str(outline.path) if pack is None or not is_bundle(pack) else pack
    quantized = pack is not None or is_bundle(subject)
    settled: dict[str, Any] = pack_options(args) if quantized else {}
    if not is_bundle(subject):
        settled |= {
            "settings": options["settings"],
            "tokenizer": None if args.tokenizer is None else str(args.tokenizer),
            "offline": args.offline,
            "pack": pack,
        }
    return Arm(
        label,
        subject,
        outline.family,
        args.variant,
        backend=args.backend,
        device=args.device,
        **settled,
    )


def _policy_arm(text: str, args: argparse.Namespace, family: str) -> Arm:
    """[LABEL=]random, oracle, ws://HOST:PORT or module:function."""
    from omega_qvla.evaluation.records import Arm

    label, equals, target = text.partition("=")
    if not equals:
        label, target = "", text
    if target.startswith(("ws://", "wss://")):
        return Arm(label or "served", target, family, args.variant, policy="served")
    return Arm(label or target.rpartition(":")[2], "", family, args.variant, policy=target)
