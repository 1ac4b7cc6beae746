"""The part of `omega-qvla compare` that looks at single episodes and tasks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console
from omega_qvla.cli.parsing import at_least
from omega_qvla.errors import ConfigError

if TYPE_CHECKING:
    from omega_qvla.evaluation.records import ArmKey, Episode, EpisodeRecord, Trace

_LISTED = 12
_Records = Mapping["ArmKey", Sequence["EpisodeRecord"]]


def configure_pairs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    group = parser.add_argument_group("flipped episodes")
    group.add_argument(
        "--videos", type=Path, metavar="DIR",
        help="play flipped episodes again and write a side-by-side film of each",
    )  # fmt: skip
    group.add_argument(
        "--max-videos", type=at_least(1), default=8, metavar="N",
        help="films of each arm, lost and won ones in turn (default: 8)",
    )  # fmt: skip


def check_settings(paths: Sequence[Path]) -> None:
    """Raise EvaluationError unless the results files were recorded under the same settings."""
    from omega_qvla.evaluation.results import check_same, read_results

    headers = [read_results(path)[0] for path in paths]
    for path, header in zip(paths[1:], headers[1:], strict=True):
        check_same(paths[0], headers[0], header, path)


def show_pairs(
    args: argparse.Namespace, records: Sequence[EpisodeRecord], reference: str, console: Console
) -> dict[str, Any]:
    """Tables of the tasks and the flips of every arm, films if asked for; JSON-ready."""
    from omega_qvla.evaluation.paired import paired_report

    if args.videos is not None and not args.results:
        raise ConfigError("--videos shows episodes: give the results files")
    by_arm: dict[ArmKey, list[EpisodeRecord]] = {}
    for record in records:
        by_arm.setdefault(record.key, []).append(record)
    reports = {}
    for key, mine in by_arm.items():
        partner = key._replace(arm=reference)
        if key != partner and partner in by_arm:
            report = reports[str(key)] = paired_report(by_arm[partner], mine)
            _show(key, reference, report, console)
            if args.videos is not None:
                report["videos"] = _films(args, key, partner, report, console)
    return reports


def _show(key: ArmKey, reference: str, report: Mapping[str, Any], console: Console) -> None:
    console.table(
        ["task", "episodes", reference, key.arm, "lost", "won", "difference, points"],
        [
            (task, t["episodes"], t["reference"], t["arm"], t["lost"] or "", t["won"] or "",
             f"{100 * t['difference']:+.1f}")
            for task, t in report["tasks"].items()
        ],
        title=f"{key} against {reference}",
    )  # fmt: skip
    for name, what in (("lost", f"only {reference}"), ("won", f"only {key.arm}")):
        found = [f"{task} #{seed}" for task, seed in report[name]]
        if found:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            console.text(f"solved by {what}: {', '.join(found[:_LISTED])}{more}")
    rows = [
        (name, arm["successes"], _number(arm["steps"], ".0f"), _number(arm["action_jerk"], ".3f"),
         _number(arm["path_jerk"], ".3f"))
        for name, arm in ((reference, report["motion"]["reference"]),
                          (key.arm, report["motion"]["arm"]))
    ]  # fmt: skip
    console.table(
        ["successful episodes of", "number", "median steps", "median jerk of actions", "of path"],
        rows,
    )
    console.text(_power_text(report["power"]))


def _power_text(power: Mapping[str, Any] | None) -> str:
    if power is None:
        return "no episode was played by both"
    needed = ", ".join(f"{p} points {n}" for p, n in power["episodes_needed"].items())
    chance = ", ".join(f"{p} points {100 * x:.0f}%" for p, x in power["power"].items())
    return (
        f"The arms disagree on {100 * power['discordance']:.1f}% of {power['episodes']} episodes. "
        f"At that rate a difference is found (80% power, exact McNemar at 5%) with so many "
        f"episodes: {needed}. These episodes find one of that size with a chance of: {chance}."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _films(
    args: argparse.Namespace,
    key: ArmKey,
    partner: ArmKey,
    report: Mapping[str, Any],
    console: Console,
) -> list[str]:
    """Play the flipped episodes of one arm and write their films."""
    from omega_qvla.evaluation.records import Episode
    from omega_qvla.evaluation.videos import write_side_by_side

    both = [[Episode(*entry) for entry in report[name]] for name in ("lost", "won")]
    mixed = [entry for pair in _in_turn(*both) for entry in pair][: args.max_videos]
    if not mixed:
        console.text(f"{key} has no flipped episodes to show")
        return []
    console.note(f"playing {len(mixed)} flipped episodes of {key} again")
    traces = {k: _traces(args, k, mixed) for k in (partner, key)}
    written = []
    for episode in mixed:
        kind = "lost" if episode in both[0] else "won"
        name = f"{kind}__{'__'.join(key)}__{episode.task}__{episode.seed}".replace("/", "-")
        path = args.videos / f"{name}.mp4"
        shown = {k.arm: traces[k][k, episode] for k in (partner, key)}
        write_side_by_side(path, f"{episode.task}   #{episode.seed}   {kind}", shown)
        console.text(f"film in {path}")
        written.append(str(path))
    return written


def _in_turn(lost: Sequence[Episode], won: Sequence[Episode]) -> list[list[Episode]]:
    """[[lost 0, won 0], [lost 1, won 1], ...], the longer list alone at the end."""
    return [[*lost[i : i + 1], *won[i : i + 1]] for i in range(max(len(lost), len(won)))]


def _traces(
    args: argparse.Namespace, key: ArmKey, episodes: Sequence[Episode]
) -> dict[tuple[ArmKey, Episode], Trace]:
    """From the results files that hold the episodes of this arm."""
    from omega_qvla.evaluation.executor import InProcess
    from omega_qvla.evaluation.replay import replay
    from omega_qvla.evaluation.results import read_results

    found: dict[tuple[ArmKey, Episode], Trace] = {}
    for path in args.results:
        played = {(record.key, record.episode) for record in read_results(path)[1]}
        mine = [(key, e) for e in episodes if (key, e) in played and (key, e) not in found]
        if mine:
            found |= replay(path, mine, args.videos / "traces", InProcess())
    return found
