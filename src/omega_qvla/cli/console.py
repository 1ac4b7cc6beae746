"""What a person sees: tables on stdout, progress on stderr; or one JSON object."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

#: (done, total, what was just done)
Tick = Callable[[int, int, str], None]
_LOG_WIDTH = 160
_WHAT_WIDTH = 32


class Console:
    """Results go to stdout, everything about progress to stderr.

    as_json: tables and text are left out, and `result` prints its object.
    quiet: no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._out = RichConsole(highlight=False)
        if not self._out.is_terminal:  # a pipe or a log: 80 columns would cut numbers off
            self._out = RichConsole(highlight=False, width=_LOG_WIDTH)
        self._err = RichConsole(stderr=True, highlight=False)
        self._start = time.monotonic()

    @property
    def live(self) -> bool:
        """Whether a moving bar makes sense: stderr is a terminal."""
        return self._err.is_terminal and not self.quiet

    def note(self, text: str) -> None:
        """A line about progress, with the time since the start."""
        if not self.quiet:
            elapsed = time.monotonic() - self._start
            self._err.print(f"[dim]{elapsed:6.1f} s[/dim]  {escape(text)}", soft_wrap=True)

    def text(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            self._out.print(escape(text), soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        title: str | None = None,
        left: int = 1,
    ) -> None:
        """A table; the first `left` columns are words, the others are numbers."""
        if self.as_json:
            return
        table = Table(title=title and escape(title), title_justify="left", header_style="bold")
        for index, name in enumerate(columns):
            justify: Any = "left" if index < left else "right"
            table.add_column(escape(name), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self._out.print(table)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Names and values, one a line."""
        if facts and not self.as_json:
            width = max(map(len, facts))
            for name, value in facts.items():
                self._out.print(
                    f"[bold]{escape(name):{width}}[/bold]  {escape(str(value))}", soft_wrap=True
                )

    def result(self, data: Mapping[str, Any]) -> None:
        """The machine-readable result; printed with --json only."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")

    @contextmanager
    def bar(self, title: str) -> Iterator[Tick]:
        """A progress bar; yields `tick(done, total, what)`. Silent where nobody can see it."""
        if not self.live:
            yield lambda done, total, what: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[what]}"),
        )
        with Progress(*columns, console=self._err, transient=True) as progress:
            task = progress.add_task(escape(title), total=None, what="")

            def tick(done: int, total: int, what: str) -> None:
                # The end of a layer's name tells it apart; a long one would squeeze out the bar.
                short = what if len(what) <= _WHAT_WIDTH else f"…{what[1 - _WHAT_WIDTH :]}"
                progress.update(task, completed=done, total=total, what=escape(short))

            yield tick
