"""What a person sees of a build: how far it is, how long it will take, where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omega_qvla.cli.console import Console, Tick
from omega_qvla.cli.formats import percent, size

if TYPE_CHECKING:
    from omega_qvla.quantize import BuildReport, Progress

#: Seconds between two lines of progress in a log.
LOG_EVERY = 60.0


def duration(seconds: float) -> str:
    """42 s, 3:07 min, 1:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"


def follow(
    console: Console, tick: Tick, now: Callable[[], float] = time.monotonic
) -> Callable[[Progress], None]:
    """A `progress` for `quantize_policy`: the bar with an ETA, or now and then a line of a log.

    The time left is that of this call's share of the work at the speed so far; until the
    first layer is done nothing is known.
    """
    begun = said = now()

    def show(progress: Progress) -> None:
        nonlocal said
        elapsed = now() - begun
        left = ""
        if 0 < progress.share < 1:
            left = f"about {duration(elapsed * (1 / progress.share - 1))} left"
        what = progress.layer or progress.stage
        tick(progress.done, progress.total, f"{left}, {what}" if left and console.live else what)
        if not console.live and now() - said >= LOG_EVERY:
            said = now()
            console.note(
                f"{progress.stage} {progress.done}/{progress.total}, {percent(progress.share)} "
                f"of the work{', ' + left if left else ''}: {what}"
            )

    return show


def show_report(report: BuildReport, console: Console) -> dict[str, Any]:
    """A table of the phases of a build; returns the same as JSON."""
    wall = sum(spent.wall for spent in report.phases.values())
    cpu = sum(spent.cpu for spent in report.phases.values())
    rows = [
        (name, duration(spent.wall), duration(spent.cpu), percent(spent.wall / wall))
        for name, spent in sorted(report.phases.items(), key=lambda item: -item[1].wall)
    ]
    console.table(
        ["phase", "time", "processor time", "of all"],
        [*rows, ("all", duration(wall), duration(cpu), "100%")],
    )
    resumed = report.layers - report.built
    earlier = f" ({resumed} more were finished before)" if resumed else ""
    console.text(
        f"{report.built} layers built{earlier}; at most {size(report.peak_memory)} of memory"
    )
    return report.to_dict()
